"""The stages of a run, one plain function each: `stage(out, *, named inputs, runtime, **spec)`."""
