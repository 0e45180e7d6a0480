"""Adapter files of every format -> what they add to each layer of a base, as `methods.update.Update`.

names         what files call a layer
forms         one layer's tensors -> its update
peft_folders  PEFT's own methods, by their configuration
read          a file, or a PEFT folder, as a whole
"""
