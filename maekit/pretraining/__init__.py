"""`maekit pretrain`: training of the masked autoencoder."""
