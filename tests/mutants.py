"""Faults put into the package's source, for `mutate.py`."""

import ast
import copy
import dataclasses

OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
# Betas swapped, epsilon for epsilon hat, one extreme for the other.
NAMES = {
    "beta_1": "beta_2",
    "beta_2": "beta_1",
    "one_minus_beta_1": "one_minus_beta_2",
    "one_minus_beta_2": "one_minus_beta_1",
    "correction_1": "one_minus_beta_1",
    "maximum": "minimum",
    "minimum": "maximum",
    "min": "max",
    "max": "min",
    "log1p": "expm1",
    "unsorted_segment_sum": "unsorted_segment_max",
}
# Calls of one argument that may be forgotten.
LEFT_ALONE = ast.Raise, ast.Assert, ast.JoinedStr, ast.FunctionDef
DROPPED = {"sqrt", "abs", "exp", "expm1", "log", "log1p", "floor", "ceil"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    file: str
    function: str
    line: int
    before: str
    after: str
    source: str = dataclasses.field(repr=False, compare=False)

    @property
    def key(self):
        return self.file, self.function, self.before, self.after

    def __str__(self):
        where = f"keras_adam/{self.file}:{self.line} {self.function}"
        return f"{where}: {self.before}  ->  {self.after}"


def _with(node, **fields):
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def changes(node):
    """Nodes to put in a node's place, one at a time."""
    if isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)):
        if type(node.op) in OPERATORS:
            yield _with(node, op=OPERATORS[type(node.op)]())
    if isinstance(node, ast.BinOp):
        left = node.left
        if isinstance(node.op, ast.Sub) and getattr(left, "value", None) == 1:
            yield node.right  # 1 - x
        if isinstance(node.op, (ast.Mult, ast.Div)):
            yield left
        if isinstance(node.op, (ast.Add, ast.Sub)):
            yield left
    elif isinstance(node, ast.AugAssign):
        yield ast.Pass()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        yield _with(node, ops=[OPERATORS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield _with(node, body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
        x = node.value
        yield _with(node, value=x + 1 if isinstance(x, int) else x * 1.5 or 0.5)
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        if isinstance(node.ctx, ast.Load):
            yield _with(node, attr=NAMES[node.attr])
    elif isinstance(node, ast.Name) and node.id in NAMES:
        if isinstance(node.ctx, ast.Load):
            yield _with(node, id=NAMES[node.id])
    elif isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        if name in DROPPED:
            yield node.args[0]


def _functions(tree, names):
    """Those of these names, or all, with the class they are in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (not names or node.name in names):
            yield node


def _slots(node):
    """Every node below a function's body and its place; no text, no annotation."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "args") and not (
            isinstance(node, ast.Call)
        ):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST):
                continue
            if isinstance(child, LEFT_ALONE):
                continue
            yield node, name, i if isinstance(value, list) else None, child
            yield from _slots(child)


def mutants(path, names=()):
    """All mutants of a file, or of these functions of it."""
    tree = ast.parse(path.read_text())
    for function in _functions(tree, names):
        for parent, name, i, child in _slots(function):
            for new in changes(child):

                def put(x, parent=parent, name=name, i=i):
                    if i is None:
                        setattr(parent, name, x)
                    else:
                        getattr(parent, name)[i] = x

                shown = parent if isinstance(child, (ast.Constant, ast.Name)) else child
                if not hasattr(shown, "lineno"):
                    shown = child
                before = ast.unparse(shown)
                put(new)
                after = ast.unparse(new if shown is child else shown)
                source = ast.unparse(ast.fix_missing_locations(tree))
                put(child)
                yield Mutant(
                    path.name, function.name, child.lineno, before, after, source
                )
