"""Write tests/registers.json: registers of every kernel, by architecture. Run it after changing a kernel."""

import json

import ptx
import test_cuda_ptx as tests


def main():
    table = {}
    for family, kind, lanes in tests.CASES:
        function = tests.FAMILIES[family][0](kind, lanes)
        table[f"{family} {kind} {lanes}"] = _registers(function)
    for name, function in tests.SINGLE.items():
        table[name] = _registers(function)
    tests.TABLE.write_text(json.dumps(table, indent=1) + "\n")


def _registers(function):
    return {f"sm_{a}{b}": ptx.compile_kernel(function, (a, b)).registers for a, b in tests.ARCHITECTURES}


if __name__ == "__main__":
    main()
