"""C, compressed instructions (RISC-V unprivileged 20191213, chapter 16): short encodings of others.

None has a meaning of its own. Hints are the instructions that they look like; reserved encodings
are illegal.
"""

from __future__ import annotations

from vmlab.engine.isa.encoding import Group

compressed = Group("C")
_short = compressed.compressed

# Quadrant 0.
_short(
    "c.addi4spn",
    "000 uimm[5:4|9:6|2|3] rd' 00",
    "addi",
    without=[("imm", 0)],
    rs1=2,
)
_short("c.fld", "001 uimm[5:3] rs1' uimm[7:6] rd' 00", "fld")
_short("c.lw", "010 uimm[5:3] rs1' uimm[2|6] rd' 00", "lw")
_short("c.ld", "011 uimm[5:3] rs1' uimm[7:6] rd' 00", "ld")
_short("c.fsd", "101 uimm[5:3] rs1' uimm[7:6] rs2' 00", "fsd")
_short("c.sw", "110 uimm[5:3] rs1' uimm[2|6] rs2' 00", "sw")
_short("c.sd", "111 uimm[5:3] rs1' uimm[7:6] rs2' 00", "sd")

# Quadrant 1.
_short("c.addi", "000 imm[5] rd imm[4:0] 01", "addi", rs1="rd")
_short("c.addiw", "001 imm[5] rd imm[4:0] 01", "addiw", without=[("rd", 0)], rs1="rd")
_short("c.li", "010 imm[5] rd imm[4:0] 01", "addi", rs1=0)
_short(
    "c.addi16sp",
    "011 imm[9] 00010 imm[4|6|8:7|5] 01",
    "addi",
    without=[("imm", 0)],
    rd=2,
    rs1=2,
)
_short("c.lui", "011 imm[17] rd imm[16:12] 01", "lui", without=[("rd", 2), ("imm", 0)])
_short("c.srli", "100 shamt[5] 00 rd' shamt[4:0] 01", "srli", rs1="rd")
_short("c.srai", "100 shamt[5] 01 rd' shamt[4:0] 01", "srai", rs1="rd")
_short("c.andi", "100 imm[5] 10 rd' imm[4:0] 01", "andi", rs1="rd")
_short("c.sub", "100 0 11 rd' 00 rs2' 01", "sub", rs1="rd")
_short("c.xor", "100 0 11 rd' 01 rs2' 01", "xor", rs1="rd")
_short("c.or", "100 0 11 rd' 10 rs2' 01", "or", rs1="rd")
_short("c.and", "100 0 11 rd' 11 rs2' 01", "and", rs1="rd")
_short("c.subw", "100 1 11 rd' 00 rs2' 01", "subw", rs1="rd")
_short("c.addw", "100 1 11 rd' 01 rs2' 01", "addw", rs1="rd")
_short("c.j", "101 imm[11|4|9:8|10|6|7|3:1|5] 01", "jal", rd=0)
_short("c.beqz", "110 imm[8|4:3] rs1' imm[7:6|2:1|5] 01", "beq", rs2=0)
_short("c.bnez", "111 imm[8|4:3] rs1' imm[7:6|2:1|5] 01", "bne", rs2=0)

# Quadrant 2.
_short("c.slli", "000 shamt[5] rd shamt[4:0] 10", "slli", rs1="rd")
_short("c.fldsp", "001 uimm[5] rd uimm[4:3|8:6] 10", "fld", rs1=2)
_short("c.lwsp", "010 uimm[5] rd uimm[4:2|7:6] 10", "lw", without=[("rd", 0)], rs1=2)
_short("c.ldsp", "011 uimm[5] rd uimm[4:3|8:6] 10", "ld", without=[("rd", 0)], rs1=2)
_short("c.jr", "100 0 rs1 00000 10", "jalr", without=[("rs1", 0)], rd=0)
_short("c.mv", "100 0 rd rs2 10", "add", without=[("rs2", 0)], rs1=0)
_short("c.ebreak", "100 1 00000 00000 10", "ebreak")
_short("c.jalr", "100 1 rs1 00000 10", "jalr", without=[("rs1", 0)], rd=1)
_short("c.add", "100 1 rd rs2 10", "add", without=[("rs2", 0)], rs1="rd")
_short("c.fsdsp", "101 uimm[5:3|8:6] rs2 10", "fsd", rs1=2)
_short("c.swsp", "110 uimm[5:2|7:6] rs2 10", "sw", rs1=2)
_short("c.sdsp", "111 uimm[5:3|8:6] rs2 10", "sd", rs1=2)
