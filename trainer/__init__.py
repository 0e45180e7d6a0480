"""What the trainer can train, and the files it becomes: between the flags (dreambooth), NoRA and PEFT."""
