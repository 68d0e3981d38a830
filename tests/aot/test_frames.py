"""The tables of functions at the head of a program."""

import pytest

from lsjax.aot.frames import stack_functions
from lsjax.aot.hlo import parse

TABLES = """\
HloModule jit_f

FileNames
1 "/x/loops.py"
2 "/x/model/block.py"

FunctionNames
1 "decode"
2 "Block.extend"

FileLocations
1 {file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=1 end_line=1 column=1 end_column=2}
3 {file_name_id=1 function_name_id=1 line=9 end_line=9 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}

ENTRY %main (p: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %a = f32[] negate(%p), metadata={op_name="jit(f)/neg" stack_frame_id=2}
  ROOT %b = f32[] negate(%a), metadata={op_name="jit(f)/neg" stack_frame_id=3}
}
"""
# The same where parents are written as they are.
PLAIN = (
    TABLES.replace("id=1 parent_frame_id=1", "id=1")
    .replace("id=2 parent_frame_id=2", "id=2 parent_frame_id=1")
    .replace("id=3 parent_frame_id=2", "id=3 parent_frame_id=1")
)


@pytest.mark.parametrize("text", [TABLES, PLAIN], ids=["shifted", "plain"])
def test_functions_on_the_stack(text):
    loops, block = "decode", "Block.extend"
    assert stack_functions(text) == {1: {loops}, 2: {loops, block}, 3: {loops}}


def test_instructions_of_a_layer():
    program = parse(TABLES)
    instructions = program.computations["main"].instructions
    found = [name for name, one in instructions.items() if program.comes_from(one, "Block.")]
    assert found == ["a"]


def test_a_program_without_tables():
    assert stack_functions("HloModule jit_f\n") == {}
