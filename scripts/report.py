"""`palimpsest report` from a checkout, where it is installed: python scripts/report.py --help"""

from palimpsest.command import run_script

if __name__ == "__main__":
    run_script(__file__)
