"""Where this package meets transformers' registry, optimum's command line and PEFT."""
