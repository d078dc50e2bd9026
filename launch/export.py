"""A checkpoint as a Hugging Face folder: deepspeed launch/export.py --config RUN.yaml [--out FOLDER]"""

from dpo_ds.cli.export_checkpoint import main

if __name__ == "__main__":
    main()
