"""`maekit evaluate finetune` and `probe`: the encoder trained with labels."""
