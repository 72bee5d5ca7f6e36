"""Pictures of what a model makes of chosen samples."""
