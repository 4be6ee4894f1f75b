"""`python -m evaluation_wsdino.report` equals `wsdino-report`."""

from . import main

if __name__ == "__main__":
    main()
