"""What torchrun starts in test_plain_parallel.py, exactly as on a cluster:

    torchrun --nproc-per-node 4 tests/train_plain.py OUT --tp 2 --pp 2 --sp --steps 10 [--restore CHECKPOINT]

Saving starts a process that imports this file again, so NeMo is imported inside the guard, not above it.
"""

if __name__ == "__main__":
    from plain_training import main

    main()
