"""The stages of a run, one plain function each: `stage(out, *inputs, runtime, **spec)`."""
