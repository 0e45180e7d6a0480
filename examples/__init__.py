"""NoRA in your own code, by `import nora` and plain PEFT."""
