"""The elastic run: its checks, its model, its data, what it logs and how it goes on."""
