"""The evaluation command of KAT and timm, by main.py: python validate.py DATA --model NAME --checkpoint FILE -b 512

In float32 unless --amp is given, of the raw weights unless --use-ema is; the last lines are --result and the JSON that timm's validate.py prints.
"""

import sys

from main import main

if __name__ == "__main__":
    sys.exit(main(["--eval", "--result", "--amp", "off", "--no-use-ema", *sys.argv[1:]]))
