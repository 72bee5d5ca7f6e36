"""HTML pages and pictures: reports, reconstructions, nearest neighbours, charts."""
