"""What LLVM does not make of a loop by itself; numba is loaded where a kernel that uses it is compiled."""

from __future__ import annotations

from functools import cached_property
from typing import Any


class Intrinsic:
    """A function of kernels that is written in LLVM's own vectors."""

    def __init__(self, define: Any) -> None:
        self._define = define

    @cached_property
    def _numba_type_(self) -> Any:
        """How numba sees this name in a kernel."""
        from numba.core import types
        from numba.core.typing.templates import make_intrinsic_template

        make: Any = make_intrinsic_template
        return types.Function(make(self, self._define, self._define.__name__))


def _top(typing: Any, line: Any, at: Any, width: Any) -> Any:
    if not hasattr(width, "literal_value"):
        return None  # numba asks again with the number

    from llvmlite import ir

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = ir.IntType(line.dtype.bitwidth)
        vector = ir.VectorType(element, width.literal_value)
        place = builder.gep(context.make_array(line)(context, builder, args[0]).data, [args[1]])
        values = builder.load(builder.bitcast(place, vector.as_pointer()), align=element.width // 8)
        sizes = builder.and_(values, ir.Constant(vector, [(1 << (element.width - 1)) - 1] * vector.count))
        name = f"llvm.vector.reduce.umax.v{vector.count}i{element.width}"
        function = builder.module.globals.get(name) or ir.Function(builder.module, ir.FunctionType(element, [vector]), name)
        return builder.call(function, [sizes])

    return line.dtype(line, at, width), code


top_of_run: Any = Intrinsic(_top)
"""top_of_run(line, at, width): the largest of `width` (a literal) unsigned integers from place `at` on, their highest bits not counted."""
