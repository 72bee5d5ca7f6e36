"""`maekit evaluate finetune` and `probe`: training of the encoder with labels."""
