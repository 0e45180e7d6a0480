"""Adapter files by their keys.

layers      the base's layers, by every name that a file may give them
sgm         the UNet's layers in diffusers' and in Stability's names
kohya       updates -> the names and tensors of kohya's sd-scripts
keys        what a key's ending says, and what a file is that is no adapter of SDXL
formulas    the tensors of one layer -> its `Update`
lora_file   a file of such layers -> updates
peft_folder a folder of PEFT, of any method -> updates
"""
