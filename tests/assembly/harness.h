/* What the programs of this directory share: they run in M mode on the bare "virt" board, write what
 * they find to the UART as text, and end the machine by its test finisher.
 *
 * `enter` runs code at another privilege until it traps into M mode; what the trap left is in
 * `record`, the a and s registers are as that code left them. t0 to t2 are everybody's.
 */
#define UART 0x10000000
#define FINISHER 0x100000
#define CLINT 0x2000000
#define PLIC 0xc000000

#define V 1
#define R 2
#define W 4
#define X 8
#define U 16
#define G 32
#define A 64
#define D 128

#define SIE (1 << 1)
#define MIE (1 << 3)
#define SPIE (1 << 5)
#define MPIE (1 << 7)
#define SPP (1 << 8)
#define MPP (3 << 11)
#define MPRV (1 << 17)
#define SUM (1 << 18)
#define MXR (1 << 19)
#define TVM (1 << 20)
#define TW (1 << 21)
#define TSR (1 << 22)

#define CAUSE 0
#define EPC 8
#define TVAL 16
#define STATUS 24

        .section .text
        .option nopic
        .globl _start
_start:
        csrr t0, mhartid
        bnez t0, park
        la sp, stack_top
        la t0, m_trap
        csrw mtvec, t0
        li t0, -1
        csrw pmpaddr0, t0
        li t0, 0x1f
        csrw pmpcfg0, t0
        csrw mie, zero
        csrw medeleg, zero
        csrw mideleg, zero
        csrw mstatus, zero
        csrw satp, zero
        j main
park:
        wfi
        j park

/* A trap into M mode: write it down and go on after `enter`. */
        .balign 4
m_trap:
        csrr t2, mstatus
        li t0, MPRV
        csrc mstatus, t0
        la t0, record
        sd t2, STATUS(t0)
        csrr t1, mcause
        sd t1, CAUSE(t0)
        csrr t1, mepc
        sd t1, EPC(t0)
        csrr t1, mtval
        sd t1, TVAL(t0)
        ld t1, 32(t0)
        jr t1

/* Run the code at t0 with the privilege t1. */
enter:
        la t2, record
        sd ra, 32(t2)
        csrw mepc, t0
        li t2, MPP
        csrc mstatus, t2
        slli t1, t1, 11
        csrs mstatus, t1
        mret

/* Put the character a0 out. */
put:
        li t0, UART
        sb a0, (t0)
        ret

/* Put the text at a0 out, the number a1 in hexadecimal, and end the line. */
show_line:
        li t0, UART
1:      lbu t1, (a0)
        beqz t1, 2f
        sb t1, (t0)
        addi a0, a0, 1
        j 1b
2:      li t1, ' '
        sb t1, (t0)
        li t2, 60
3:      srl t1, a1, t2
        andi t1, t1, 15
        addi t1, t1, '0'
        li a0, '9'
        ble t1, a0, 4f
        addi t1, t1, 'a' - '0' - 10
4:      sb t1, (t0)
        addi t2, t2, -4
        bgez t2, 3b
end_line:
        li t0, UART
        li t1, '\n'
        sb t1, (t0)
        ret

finish:
        li t0, FINISHER
        li t1, 0x5555
        sw t1, (t0)
        j .

/* Show a register under a name, or what the last trap left. */
        .macro show text, register
        mv a1, \register
        .pushsection .rodata
name\@: .asciz "\text"
        .popsection
        la a0, name\@
        call show_line
        .endm

        .macro show_csr text, csr
        csrr a1, \csr
        show "\text", a1
        .endm

        .macro show_record text, field
        la a1, record
        ld a1, \field(a1)
        show "\text", a1
        .endm

/* Cause, value, and where from: the distance from a label. */
        .macro show_trap text, label
        show_record "\text cause", CAUSE
        show_record "\text tval", TVAL
        la a1, record
        ld a1, EPC(a1)
        la a0, \label
        sub a1, a1, a0
        show "\text epc", a1
        show_record "\text status", STATUS
        .endm

/* Run the code at a label with a privilege. */
        .macro run label, privilege
        la t0, \label
        li t1, \privilege
        call enter
        .endm

        .section .bss
        .balign 4096
stack:  .space 4096
stack_top:
record: .space 64
        .section .text
