"""A reference's log-probs on disk: deepspeed launch/cache_reference.py --config RUN.yaml [--section.key value ...]"""

from dpo_ds.cli.cache_reference import main

if __name__ == "__main__":
    main()
