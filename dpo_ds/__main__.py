"""``python -m dpo_ds COMMAND``."""

from dpo_ds.cli.commands import main

if __name__ == "__main__":
    main()
