"""The evaluation command of KAT and timm, run by main.py: python validate.py DATA --model NAME --checkpoint FILE -b 512

It evaluates the raw weights in float32 (--use-ema and --amp override this). Its last lines are --result and the JSON
that timm's validate.py prints.
"""

import sys

from main import main

if __name__ == "__main__":
    sys.exit(main(["--eval", "--result", "--amp", "off", "--no-use-ema", *sys.argv[1:]]))
