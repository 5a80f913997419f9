/* Exceptions from each privilege, taken in M and, delegated, in S mode; returns; what mstatus may
 * forbid; what control registers keep of a write; which of them are there for whom.
 * RISC-V privileged 1.12, 2.1, 2.2, 3.1, 3.2.2, 3.3, 4.1.
 */
#include "harness.h"

#define NOWHERE 0x18000000
#define DELEGATED 0xb1ff        /* all but calls from S mode, which bring us back */

main:
        li t0, CLINT + 0x4000
        li t1, -1
        sd t1, (t0)             /* no timer interrupt */
        call exceptions
        call delegated
        call returns
        call forbidden
        call counters
        call kept
        call immediates
        call present
        j finish

/* S mode's handler: what it finds goes into s2 to s5, and M mode is called. */
        .balign 4
s_trap:
        csrr s2, scause
        csrr s3, sepc
        csrr s4, stval
        csrr s5, sstatus
        ecall

/* ------------------------------------------------------------------------- what goes wrong how */

illegal_zero:
        .2byte 0
illegal_ones:
        .4byte 0xffffffff
        .balign 4
illegal_short:
        .2byte 0x8002           /* c.jr x0, reserved */
        .balign 4
illegal_long:
        .4byte 0x0000705b
illegal_csr:
        csrr a1, 0x123
illegal_write:
        csrw 0xc00, a1          /* cycle is read-only */
read_only_set:
        csrs 0xc01, zero        /* no write: allowed */
        ecall
breakpoint:
        .option push
        .option norvc
        ebreak
        .option pop
short_breakpoint:
        c.ebreak
        .balign 4
environment:
        ecall
load_nowhere:
        li a0, NOWHERE
        ld a1, 16(a0)
store_nowhere:
        li a0, NOWHERE
        sb a1, -3(a0)
fetch_nowhere:
        li a0, NOWHERE
        jr a0
reserve_misaligned:
        la a0, cell + 2
        lr.w a1, (a0)
conditional_misaligned:
        la a0, cell + 4
        sc.d a1, a1, (a0)
atomic_misaligned:
        la a0, cell + 1
        amoadd.w a1, a1, (a0)
atomic_nowhere:
        li a0, NOWHERE
        amoswap.d a1, a1, (a0)
reserve_nowhere:
        li a0, NOWHERE
        lr.d a1, (a0)
floating_off:
        fadd.d fa0, fa0, fa0
floating_csr_off:
        csrr a1, fflags
supervisor_csr:
        csrr a1, sscratch
        ecall
machine_csr:
        csrr a1, mscratch
        ecall
machine_return:
        mret
supervisor_return:
        la a0, 1f
        csrw sepc, a0
        sret
1:      ecall
fence_supervisor:
        sfence.vma
        ecall
invalidate_supervisor:
        sinval.vma zero, zero
        ecall
wait:
        wfi
        ecall
odd_jump:
        la a0, 1f + 1
        jr a0                   /* the lowest bit is dropped */
1:      ecall

        .macro each macro
        \macro illegal_zero
        \macro illegal_ones
        \macro illegal_short
        \macro illegal_long
        \macro illegal_csr
        \macro illegal_write
        \macro read_only_set
        \macro breakpoint
        \macro short_breakpoint
        \macro load_nowhere
        \macro store_nowhere
        \macro fetch_nowhere
        \macro reserve_misaligned
        \macro conditional_misaligned
        \macro atomic_misaligned
        \macro atomic_nowhere
        \macro reserve_nowhere
        \macro floating_off
        \macro floating_csr_off
        \macro supervisor_csr
        \macro machine_csr
        \macro fence_supervisor
        \macro invalidate_supervisor
        \macro odd_jump
        .endm

        .macro in_machine snippet
        run \snippet, 3
        show_trap "\snippet in M", \snippet
        run \snippet, 1
        show_trap "\snippet in S", \snippet
        run \snippet, 0
        show_trap "\snippet in U", \snippet
        .endm

exceptions:
        addi sp, sp, -16
        sd ra, (sp)
        csrw mcounteren, zero
        li t0, 7
        csrw mcounteren, t0
        csrw scounteren, t0
        each in_machine
        in_machine environment
        ld ra, (sp)
        addi sp, sp, 16
        ret

        .macro in_supervisor snippet
        .irp privilege, 1, 0
        li s2, 0
        li s3, 0
        li s4, 0
        li s5, 0
        run \snippet, \privilege
        show "\snippet delegated, \privilege: scause", s2
        la a0, \snippet
        sub s3, s3, a0
        show "\snippet delegated, \privilege: sepc", s3
        show "\snippet delegated, \privilege: stval", s4
        show "\snippet delegated, \privilege: sstatus", s5
        show_record "\snippet delegated, \privilege: then mcause", CAUSE
        show_record "\snippet delegated, \privilege: status", STATUS
        .endr
        .endm

delegated:
        addi sp, sp, -16
        sd ra, (sp)
        la t0, s_trap
        csrw stvec, t0
        li t0, DELEGATED
        csrw medeleg, t0
        show_csr "medeleg", medeleg
        each in_supervisor
        in_supervisor environment
        /* What M mode does wrong is not delegated. */
        run illegal_long, 3
        show_trap "not from M", illegal_long
        csrw medeleg, zero
        ld ra, (sp)
        addi sp, sp, 16
        ret

/* ------------------------------------------------------------------------------------- returns */

to_machine:
        csrr a2, mstatus        /* where `mret` has brought us, in M mode */
        ecall
to_others:
        ecall
supervisor_comes_back:
        csrr a2, sstatus
        ecall

returns:
        addi sp, sp, -16
        sd ra, (sp)
        /* mret with all of MPP (2 is taken as it is read), MIE and MPIE. */
        li s2, 0
1:      la t0, record
        la t1, 2f
        sd t1, 32(t0)
        la t0, to_others
        csrw mepc, t0
        csrw mstatus, zero
        andi t0, s2, 3          /* MPP */
        slli t0, t0, 11
        andi t1, s2, 4          /* MIE */
        slli t1, t1, 1
        or t0, t0, t1
        andi t1, s2, 8          /* MPIE */
        slli t1, t1, 4
        or t0, t0, t1
        csrw mstatus, t0
        csrr s3, mstatus
        mret
        .balign 4
2:      show "mret", s2
        show "mret from", s3
        show_record "mret leaves", STATUS
        show_record "mret, cause", CAUSE
        addi s2, s2, 1
        li t0, 16
        blt s2, t0, 1b

        /* sret from M mode and from S mode, with SPP, SPIE, SIE. */
        li s2, 0
3:      la t0, record
        la t1, 4f
        sd t1, 32(t0)
        la t0, to_others
        csrw sepc, t0
        csrw mstatus, zero
        andi t0, s2, 1          /* SPP */
        slli t0, t0, 8
        andi t1, s2, 2          /* SIE */
        or t0, t0, t1
        andi t1, s2, 4          /* SPIE */
        slli t1, t1, 3
        or t0, t0, t1
        li t1, MPRV | MPP
        or t0, t0, t1
        csrw mstatus, t0
        csrr s3, mstatus
        sret
        .balign 4
4:      show "sret", s2
        show "sret from", s3
        show_record "sret leaves", STATUS
        show_record "sret, cause", CAUSE
        addi s2, s2, 1
        li t0, 8
        blt s2, t0, 3b
        csrw mstatus, zero

        run machine_return, 1
        show_trap "mret in S", machine_return
        run machine_return, 0
        show_trap "mret in U", machine_return
        li t0, SPP
        csrs mstatus, t0
        run supervisor_return, 1
        show_trap "sret in S", supervisor_return
        run supervisor_return, 0
        show_trap "sret in U", supervisor_return

        /* A trap keeps the interrupt enables: SIE and MIE in all combinations, from S and U. */
        li s2, 0
5:      csrw mstatus, zero
        andi t0, s2, 1
        slli t0, t0, 1          /* SIE */
        andi t1, s2, 2
        slli t1, t1, 6          /* MPIE becomes MIE */
        or t0, t0, t1
        csrw mstatus, t0
        srli s3, s2, 2
        la t0, environment
        mv t1, s3
        call enter
        show_record "enables", STATUS
        addi s2, s2, 1
        li t0, 8
        blt s2, t0, 5b
        csrw mstatus, zero
        ld ra, (sp)
        addi sp, sp, 16
        ret

/* ------------------------------------------------------------------- TVM, TW, TSR; mcounteren */

read_satp:
        csrr a1, satp
        ecall
write_satp:
        csrw satp, zero
        ecall

forbidden:
        addi sp, sp, -16
        sd ra, (sp)
        /* An interrupt of S mode's is pending and not taken there, so that nobody waits for long. */
        li t0, 2
        csrw mideleg, t0
        csrw mie, t0
        csrw mip, t0
        .irp bit, 0, TVM, TW, TSR
        csrw mstatus, zero
        li t0, \bit
        csrw mstatus, t0
        .irp snippet, read_satp, write_satp, fence_supervisor, invalidate_supervisor
        run \snippet, 1
        show_trap "\bit: \snippet in S", \snippet
        .endr
        li t0, SPP
        csrs mstatus, t0
        run supervisor_return, 1
        show_trap "\bit: sret in S", supervisor_return
        csrw mstatus, zero
        li t0, \bit
        csrw mstatus, t0
        .irp privilege, 1, 3
        run wait, \privilege
        show_trap "\bit: wfi in \privilege", wait
        .endr
        csrw mie, zero
        run wait, 0
        show_trap "\bit: wfi in U", wait
        li t0, 2
        csrw mie, t0
        .endr
        csrw mstatus, zero
        csrw mie, zero
        csrw mip, zero
        csrw mideleg, zero
        ld ra, (sp)
        addi sp, sp, 16
        ret

read_cycle:
        csrr a1, cycle
        ecall
read_time:
        csrr a1, time
        ecall
read_instret:
        csrr a1, instret
        ecall

counters:
        addi sp, sp, -16
        sd ra, (sp)
        li s2, 0
1:      andi t0, s2, 7
        csrw mcounteren, t0
        srli t0, s2, 3
        csrw scounteren, t0
        show "counters", s2
        .irp snippet, read_cycle, read_time, read_instret
        .irp privilege, 3, 1, 0
        run \snippet, \privilege
        show_record "\snippet in \privilege", CAUSE
        .endr
        .endr
        addi s2, s2, 1
        li t0, 64
        blt s2, t0, 1b
        ld ra, (sp)
        addi sp, sp, 16
        ret

/* -------------------------------------------------------------- what is kept of what is written */

        .macro keeps name, mask=-1
        csrr s2, \name
        .irp pattern, 0, -1, 0x5555555555555555, 0xaaaaaaaaaaaaaaaa, 0x123456789abcdef0
        li t0, \pattern
        csrw \name, t0
        csrr a1, \name
        li a0, \mask
        and a1, a1, a0
        show "\name after \pattern", a1
        .endr
        csrw \name, s2
        .endm

kept:
        addi sp, sp, -16
        sd ra, (sp)
        csrw mie, zero
        li t0, 3 << 13
        csrw mstatus, t0        /* floating point is on */
        keeps mscratch
        keeps sscratch
        keeps mepc
        keeps sepc
        keeps mcause, 0x800000000000000f
        keeps scause, 0x800000000000000f
        keeps mtval
        keeps stval
        keeps mtvec
        keeps stvec
        keeps medeleg, 0xb3ff   /* no hypervisor's; a call from M is never delegated */
        keeps mideleg, 0xaaa    /* no hypervisor's */
        keeps mie, 0xbbb
        keeps mip, 0xbbb
        keeps mcounteren, 7
        keeps scounteren, 7
        keeps menvcfg, 0x80000000000000f1
        keeps senvcfg, 0xf1
        keeps sstatus, ~0x8000000300000600      /* UXL, and VS, which is not there, and SD for it */
        keeps sie
        keeps sip
        keeps misa, 0x8000000000000001
        keeps fcsr
        li t0, 0x222
        csrw mideleg, t0
        keeps sie
        keeps sip
        keeps mip, 0xbbb
        csrw mideleg, zero
        keeps stimecmp

        /* mstatus, a bit at a time: MPRV would mislead the stack, so it goes again at once. */
        li s2, 0
1:      li t1, ~0xcf00000600     /* the hypervisor's and vector state; UXL and SXL */
        li t0, 1
        sll t0, t0, s2
        and t0, t0, t1
        csrw mstatus, zero
        csrw mstatus, t0
        csrr s3, mstatus
        csrw mstatus, zero
        show "mstatus bit", s2
        show "mstatus", s3
        addi s2, s2, 1
        li t0, 64
        blt s2, t0, 1b
        csrw mstatus, zero
        li t0, ~0x300000600
        csrw sstatus, t0
        csrr s3, mstatus
        csrw mstatus, zero
        show "mstatus through sstatus", s3
        /* A privilege that is not there. */
        li t0, 2 << 11
        csrw mstatus, t0
        csrr s3, mstatus
        show "MPP of 2", s3
        li t0, MPP
        csrw mstatus, t0
        li t0, 2 << 11
        csrw mstatus, t0
        csrr s3, mstatus
        show "MPP of 2 after 3", s3
        /* Dirty floating-point state is told, also where only the flags are written. */
        li t0, 1 << 13
        csrw mstatus, t0
        csrr a1, fflags
        show_csr "initial, read", mstatus
        csrw fflags, zero
        show_csr "written", mstatus
        li t0, 2 << 13
        csrw mstatus, t0
        fmv.d.x fa0, zero
        show_csr "clean, moved", mstatus
        li t0, 2 << 13
        csrw mstatus, t0
        fmv.x.d a1, fa0
        show_csr "clean, moved from", mstatus
        li t0, 2 << 13
        csrw mstatus, t0
        la a0, cell
        fsd fa0, (a0)
        show_csr "clean, stored", mstatus
        li t0, 2 << 13
        csrw mstatus, t0
        la a0, cell
        fld fa0, (a0)
        show_csr "clean, loaded", mstatus
        csrw mstatus, zero
        ld ra, (sp)
        addi sp, sp, 16
        ret

/* ------------------------------------------------------- the six instructions, with all operands */

immediates:
        addi sp, sp, -16
        sd ra, (sp)
        li t0, 0x123456789abcdef5
        csrw mscratch, t0
        csrrwi s2, mscratch, 21
        csrrsi s3, mscratch, 10
        csrrci s4, mscratch, 3
        csrrsi s5, mscratch, 0
        csrrci s6, mscratch, 0
        csrrwi zero, mscratch, 31
        csrr s7, mscratch
        csrrwi s8, mscratch, 0
        csrr s9, mscratch
        .irp register, s2, s3, s4, s5, s6, s7, s8, s9
        show "by immediate: \register", \register
        .endr
        li s2, 0x5555555555555555
        li s3, 0x3333333333333333
        csrw mscratch, s2
        csrrs s4, mscratch, s3
        csrrc s5, mscratch, s2
        csrrw s3, mscratch, s3          /* the operand is the destination */
        csrrs s6, mscratch, zero
        csrrw zero, mscratch, s2
        csrrs s2, mscratch, s2
        csrr s7, mscratch
        .irp register, s2, s3, s4, s5, s6, s7
        show "by register: \register", \register
        .endr
        ld ra, (sp)
        addi sp, sp, 16
        ret

/* ------------------------------------------------------------------------ which registers exist */

/* For each number one bit: `csrrs a1, number, x0` is no exception; then with a write of the same
 * value. What is left to implementations is not looked at: the ranges of `free`. */
present:
        addi sp, sp, -16
        sd ra, (sp)
        li s10, 0               /* 0: read; 1: set no bits */
1:      li s9, 3                /* privilege */
2:      li s2, 0                /* number */
3:      li s3, 0                /* 64 answers */
4:      la t0, free
5:      lhu t1, 0(t0)
        lhu t2, 2(t0)
        addi t0, t0, 4
        beqz t2, 6f
        blt s2, t1, 5b
        bgt s2, t2, 5b
        j 8f
6:      slli t0, s2, 20
        li t1, 0x000025f3       /* csrrs a1, 0, x0 */
        beqz s10, 7f
        li t1, 0x000325f3       /* csrrs a1, 0, t1; there is 0 in t1 */
7:      or t0, t0, t1
        la t1, probe
        sw t0, (t1)
        fence.i
        mv a0, t1
        la t0, probing
        mv t1, s9
        call enter
        la t0, record
        ld t0, CAUSE(t0)
        addi t0, t0, -2
        beqz t0, 8f
        andi t0, s2, 63
        li t1, 1
        sll t1, t1, t0
        or s3, s3, t1
8:      addi s2, s2, 1
        andi t0, s2, 63
        bnez t0, 4b
        show "registers", s3
        li t0, 4096
        blt s2, t0, 3b
        addi s9, s9, -1
        li t0, 2
        bne s9, t0, 9f
        li s9, 1
9:      bgez s9, 2b
        addi s10, s10, 1
        li t0, 2
        blt s10, t0, 1b
        ld ra, (sp)
        addi sp, sp, 16
        ret
probing:
        li t1, 0
        .balign 4
        .option push
        .option norvc
probe:  .4byte 0
        .option pop
        ecall

        .section .rodata
        .balign 4
free:   /* Vector and hypervisor state, debugging, performance counters, what is custom. */
        .2byte 0x008, 0x00f
        .2byte 0x015, 0x015
        .2byte 0x200, 0x2ff
        .2byte 0x320, 0x33f
        .2byte 0x5a8, 0x5a8
        .2byte 0x600, 0x6ff
        .2byte 0x7a0, 0x8ff
        .2byte 0x9c0, 0x9ff
        .2byte 0xa00, 0xaff
        .2byte 0xb03, 0xb1f
        .2byte 0xb80, 0xbff
        .2byte 0xc03, 0xcff
        .2byte 0xd80, 0xeff
        .2byte 0xfc0, 0xfff
        .2byte 0, 0

        .section .bss
        .balign 16
cell:   .space 16
