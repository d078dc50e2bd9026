"""The model of a checkpoint: deepspeed launch/export.py --config RUN.yaml [--section.key value ...]"""

from dpo_ds.cli.export import main

if __name__ == "__main__":
    main()
