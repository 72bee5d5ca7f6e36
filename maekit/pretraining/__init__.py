"""`maekit pretrain`: the masked autoencoder as what is trained."""
