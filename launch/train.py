"""DPO on DeepSpeed: deepspeed launch/train.py --config RUN.yaml [--section.key value ...]"""

from dpo_ds.cli.train import main

if __name__ == "__main__":
    main()
