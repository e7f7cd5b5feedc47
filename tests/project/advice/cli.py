from tests.support.advice import Table
CASES = Table()
case = CASES.add
