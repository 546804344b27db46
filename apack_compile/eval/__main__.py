"""lm-eval's command line with the model `apack`: `python -m apack_compile.eval run --model apack --model_args ...`."""

import apack_compile.eval  # noqa: F401

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
