"""The masked autoencoder: masking, targets, positions, encoder, decoder, and the autoencoder that joins them."""
