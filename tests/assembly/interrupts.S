/* Which of several interrupts is taken, in which mode, at which address; what mip and sip tell and
 * take; the timers' comparisons; what the PLIC forwards and in which order it is claimed.
 * RISC-V privileged 1.12, 3.1.6.1, 3.1.7 to 3.1.9, 4.1.3; Sstc 1.0; PLIC 1.0.0.
 */
#include "harness.h"

#define MTIMECMP (CLINT + 0x4000)
#define UART_SOURCE 10
#define RTC_SOURCE 11
#define RTC 0x101000
#define ENABLE_M (PLIC + 0x2000)
#define ENABLE_S (PLIC + 0x2080)
#define THRESHOLD_M (PLIC + 0x200000)
#define THRESHOLD_S (PLIC + 0x201000)
#define CLAIM_S (PLIC + 0x201004)
#ifdef QUICK
#define STEP 11
#else
#define STEP 1
#endif

main:
        call quiet
        /* The UART's transmitter is empty and says so to the PLIC. */
        li t0, UART
        li t1, 2
        sb t1, 1(t0)
        li t0, PLIC
        li t1, 1
        sw t1, 4 * UART_SOURCE (t0)
        la t0, s_trap
        csrw stvec, t0
        call matrix
        call vectored
        call pending
        call timers
        call waiting
        call controller
        j finish

        .balign 4
s_trap:
        csrr s2, scause
        ecall

/* No interrupt is pending. */
quiet:
        csrw mie, zero
        csrw mip, zero
        li t0, CLINT
        sw zero, (t0)
        li t0, MTIMECMP
        li t1, -1
        sd t1, (t0)
        li t0, ENABLE_M
        sw zero, (t0)
        li t0, ENABLE_S
        sw zero, (t0)
/* QEMU 7.2 looks at the enables when something else changes. */
look:
        li t0, THRESHOLD_M
        sw zero, (t0)
        li t0, THRESHOLD_S
        sw zero, (t0)
        ret

/* Make the interrupts of a0 pending: SSIP 1, MSIP 2, STIP 4, MTIP 8, SEIP 16, MEIP 32. */
make_pending:
        andi t0, a0, 1
        slli t0, t0, 1
        andi t1, a0, 4
        slli t1, t1, 3
        or t0, t0, t1
        andi t1, a0, 16
        slli t1, t1, 5
        or t0, t0, t1
        csrw mip, t0
        srli t0, a0, 1
        andi t0, t0, 1
        li t1, CLINT
        sw t0, (t1)
        andi t0, a0, 8
        li t1, MTIMECMP
        li t2, -1
        beqz t0, 1f
        li t2, 0
1:      sd t2, (t1)
        andi t0, a0, 32
        li t1, ENABLE_M
        slli t0, t0, UART_SOURCE - 5
        sw t0, (t1)
        j look

calm:
        nop
        nop
        ecall

/* For all sets of pending interrupts, delegations, privileges and enables, which is taken: a letter
 * for the number of one that is taken in M mode, a small one in S mode, '.' for none. */
matrix:
        addi sp, sp, -16
        sd ra, (sp)
        li t0, 0xaaa
        csrw mie, t0
        li s3, 0                /* delegation */
1:      li s4, 3                /* privilege */
2:      li s5, 0                /* enables */
3:      li s6, 0                /* pending */
4:      la t0, delegations
        slli t1, s3, 3
        add t0, t0, t1
        ld t0, (t0)
        csrw mideleg, t0
        mv a0, s6
        call make_pending
        csrw mstatus, zero
        andi t0, s5, 1
        slli t0, t0, 7          /* MPIE becomes MIE */
        andi t1, s5, 2          /* SIE */
        or t0, t0, t1
        csrw mstatus, t0
        li s2, 0
        la t0, calm
        mv t1, s4
        call enter
        la t0, record
        ld t0, CAUSE(t0)
        li a0, '.'
        bgez t0, 5f
        andi t0, t0, 15
        addi a0, t0, 'A'
        j 6f
5:      bgez s2, 6f
        andi t0, s2, 15
        addi a0, t0, 'a'
6:      csrw mstatus, zero
        call put
        addi s6, s6, STEP
        li t0, 64
        blt s6, t0, 4b
        call end_line
        addi s5, s5, 1
        li t0, 4
        blt s5, t0, 3b
        addi s4, s4, -1
        li t0, 2
        bne s4, t0, 7f
        li s4, 1
7:      bgez s4, 2b
        addi s3, s3, 1
        li t0, 5
        blt s3, t0, 1b
        csrw mideleg, zero
        call quiet
        ld ra, (sp)
        addi sp, sp, 16
        ret
        .section .rodata
        .balign 8
delegations:
        .dword 0, 0x222, 0x002, 0x220, 0x200
        .section .text

/* Vectored: interrupt n goes to the base + 4 n, an exception to the base. */
        .balign 256
        .option push
        .option norvc
m_table:
        .rept 16
        jal s7, m_landed
        .endr
s_table:
        .rept 16
        jal s7, s_landed
        .endr
        .option pop
m_landed:
        la t0, m_table
        sub s7, s7, t0
        j m_trap
s_landed:
        la t0, s_table
        sub s7, s7, t0
        j s_trap

vectored:
        addi sp, sp, -16
        sd ra, (sp)
        la t0, m_table + 1
        csrw mtvec, t0
        la t0, s_table + 1
        csrw stvec, t0
        li t0, 0xaaa
        csrw mie, t0
        li s4, 0
1:      la t0, delegations
        slli t1, s4, 3
        add t0, t0, t1
        ld t0, (t0)
        csrw mideleg, t0
        li s5, 0
2:      li a0, 1
        sll a0, a0, s5
        call make_pending
        csrw mstatus, zero
        li s7, 0
        li s2, 0
        run calm, 0
        show "vectored, went to", s7
        show_record "mcause", CAUSE
        show "scause", s2
        addi s5, s5, 1
        li t0, 6
        blt s5, t0, 2b
        addi s4, s4, 1
        li t0, 2
        blt s4, t0, 1b
        call quiet
        csrw mideleg, zero
        li s7, 0
        run calm, 0
        show "vectored exception, went to", s7
        la t0, m_trap
        csrw mtvec, t0
        la t0, s_trap
        csrw stvec, t0
        ld ra, (sp)
        addi sp, sp, 16
        ret

/* What mip and sip tell, and which of their bits who may write. */
        .macro tell text
        csrr s2, mip
        csrr s3, sip
        li t0, 0xaaa            /* no hypervisor's */
        and s2, s2, t0
        show "\text: mip", s2
        show "\text: sip", s3
        .endm

pending:
        addi sp, sp, -16
        sd ra, (sp)
        call quiet
        tell "quiet"
        li s4, 0
1:      la t0, delegations
        slli t1, s4, 3
        add t0, t0, t1
        ld t0, (t0)
        csrw mideleg, t0
        csrr a1, mideleg
        show "delegated", a1
        li a0, 63
        call make_pending
        tell "everything"
        csrc mip, zero
        li t0, -1
        csrc mip, t0
        tell "cleared in mip"
        csrs mip, t0
        li t0, -1
        csrs mip, t0
        tell "set in mip"
        li t0, -1
        csrc sip, t0
        tell "cleared in sip"
        li t0, -1
        csrs sip, t0
        tell "set in sip"
        csrw sip, zero
        tell "written in sip"
        li t0, -1
        csrw sie, t0
        csrr s2, mie
        csrr s3, sie
        show "mie", s2
        show "sie", s3
        csrw sie, zero
        csrr s2, mie
        show "mie", s2
        li t0, 0xaaa
        csrw mie, t0
        csrr s3, sie
        show "sie", s3
        csrw sie, zero
        csrr s2, mie
        show "mie", s2
        call quiet
        addi s4, s4, 1
        li t0, 5
        blt s4, t0, 1b
        csrw mideleg, zero

        /* SEIP is the PLIC's line or the bit; only the bit is written, and is what is set or
         * cleared (3.1.9). */
        li t0, ENABLE_S
        li t1, 1 << UART_SOURCE
        sw t1, (t0)
        call look
        tell "SEIP by the line"
        li t0, 1 << 9
        csrc mip, t0
        tell "line, cleared"
        li t0, 1 << 1
        csrs mip, t0            /* must not copy the line into the bit */
        tell "line, another bit set"
        li t0, ENABLE_S
        sw zero, (t0)
        call look
        tell "line gone"
        li t0, 1 << 9
        csrs mip, t0
        tell "bit"
        li t0, ENABLE_S
        li t1, 1 << UART_SOURCE
        sw t1, (t0)
        call look
        tell "bit and line"
        li t0, ENABLE_S
        sw zero, (t0)
        call look
        tell "bit stays"
        csrw mip, zero
        tell "nothing"
        ld ra, (sp)
        addi sp, sp, 16
        ret

/* mtimecmp and, lent to S mode, stimecmp. */
set_stimecmp:
        csrw 0x14d, a0
        csrr a1, 0x14d
        ecall
clear_timer:
        li t0, 1 << 5
        csrc sip, t0
        csrr a1, sip
        ecall

timers:
        addi sp, sp, -16
        sd ra, (sp)
        call quiet
        li t0, MTIMECMP
        csrr t1, time
        sd t1, (t0)
        tell "mtimecmp now"
        li t0, MTIMECMP
        li t1, -1
        sd t1, (t0)
        tell "mtimecmp never"
        li t0, 0x20
        csrw mideleg, t0
        csrw 0x14d, zero
        tell "stimecmp past, not lent"
        li t0, 1
        slli t0, t0, 63
        csrs menvcfg, t0
        csrw 0x14d, zero
        tell "stimecmp past"
        li t0, 1 << 5
        csrc mip, t0
        tell "cleared by M"
        li t0, -1
        csrw 0x14d, t0
        tell "stimecmp never"
        li t0, 1 << 5
        csrs mip, t0
        tell "set by M"
        li t0, 7
        csrw mcounteren, t0
        li a0, 0
        li a1, 0
        run set_stimecmp, 1
        show_trap "set by S", set_stimecmp
        show "stimecmp", a1
        tell "set by S"
        run clear_timer, 1
        show "cleared by S", a1
        run set_stimecmp, 0
        show_trap "set by U", set_stimecmp
        li t0, 5
        csrw mcounteren, t0
        run set_stimecmp, 1
        show_trap "not without TM", set_stimecmp
        li t0, 7
        csrw mcounteren, t0
        li t0, 1
        slli t0, t0, 63
        csrc menvcfg, t0
        run set_stimecmp, 1
        show_trap "not without STCE", set_stimecmp
        /* Taken in S mode once the moment has come. */
        li t0, 1
        slli t0, t0, 63
        csrs menvcfg, t0
        li t0, -1
        csrw 0x14d, t0
        li t0, 0x20
        csrw mie, t0
        la t0, s_trap
        csrw stvec, t0
        li s2, 0
        run wait_for_timer, 1
        show "taken", s2
        show_record "mcause", CAUSE
        li t0, -1
        csrw 0x14d, t0
        csrw mie, zero
        csrw mideleg, zero
        li t0, 1
        slli t0, t0, 63
        csrc menvcfg, t0
        ld ra, (sp)
        addi sp, sp, 16
        ret
wait_for_timer:
        csrr t0, time
        li t1, 1000
        add t0, t0, t1
        csrw 0x14d, t0
        li t0, SIE
        csrs sstatus, t0
1:      wfi
        j 1b

/* wfi ends where an interrupt is pending and enabled in mie, be it taken or not. */
waiting:
        addi sp, sp, -16
        sd ra, (sp)
        call quiet
        csrw mstatus, zero
        li t0, 0x80
        csrw mie, t0
        li t0, MTIMECMP
        csrr t1, time
        addi t1, t1, 1000
        sd t1, (t0)
        wfi
        tell "waited for the timer"
        call quiet
        li t0, 8
        csrw mie, t0
        li t0, CLINT
        li t1, 1
        sw t1, (t0)
        wfi
        tell "waited for software"
        li s2, 0
        la t0, record
        la t1, 1f
        sd t1, 32(t0)
        li t0, MIE
        csrs mstatus, t0
        nop
        j .
        .balign 4
1:      show_record "taken as soon as enabled", CAUSE
        call quiet
        ld ra, (sp)
        addi sp, sp, 16
        ret

/* The PLIC: sources 10, the UART, and 11, the clock's alarm, both high. */
        .macro source number, priority
        li t0, PLIC + 4 * \number
        li t1, \priority
        sw t1, (t0)
        .endm

        .macro threshold value
        li t0, THRESHOLD_S
        li t1, \value
        sw t1, (t0)
        .endm

        .macro claim text
        csrr s2, mip
        li t0, CLAIM_S
        lw s3, (t0)
        csrr s4, mip
        show "\text: before", s2
        show "\text: claimed", s3
        show "\text: after", s4
        .endm

        .macro complete number
        li t0, CLAIM_S
        li t1, \number
        sw t1, (t0)
        .endm

controller:
        addi sp, sp, -16
        sd ra, (sp)
        call quiet
        li t0, RTC
        li t1, 1
        sw t1, 0x10(t0)         /* interrupts on */
        lw t1, 0(t0)            /* now, the high half latched */
        lw t1, 4(t0)
        sw zero, 0xc(t0)        /* an alarm in the past */
        sw zero, 8(t0)
        li t0, ENABLE_S
        li t1, (1 << UART_SOURCE) | (1 << RTC_SOURCE)
        sw t1, (t0)
        call look
        lw a1, (t0)
        show "enabled", a1
        source UART_SOURCE, 1
        source RTC_SOURCE, 1
        li t0, PLIC + 0x1000
        lw a1, (t0)
        show "pending", a1
        claim "same priority"
        claim "the other one"
        claim "none"
        complete RTC_SOURCE
        tell "one completed"
        complete UART_SOURCE
        source RTC_SOURCE, 3
        claim "higher priority"
        complete RTC_SOURCE
        source RTC_SOURCE, 0
        claim "priority 0"
        complete UART_SOURCE
        source UART_SOURCE, 2
        threshold 2
        tell "not above the threshold"
        threshold 1
        tell "above the threshold"
        threshold 7
        source UART_SOURCE, 7
        tell "never above 7"
        threshold 0
        source UART_SOURCE, -1
        li t0, PLIC + 4 * UART_SOURCE
        lw a1, (t0)
        show "priority's bits", a1
        threshold -1
        li t0, THRESHOLD_S
        lw a1, (t0)
        show "threshold's bits", a1
        threshold 0
        li t0, ENABLE_S
        sw zero, (t0)
        call look
        tell "disabled"
        complete 5              /* what was not claimed */
        li t0, ENABLE_S
        li t1, 1 << UART_SOURCE
        sw t1, (t0)
        call look
        source UART_SOURCE, 1
        claim "again"
        complete RTC_SOURCE     /* another one's number */
        claim "not completed"
        complete UART_SOURCE
        claim "completed"
        complete UART_SOURCE
        /* The line falls while its interrupt is pending, and while it is claimed. */
        li t0, UART
        sb zero, 1(t0)
        call quiet
        ld ra, (sp)
        addi sp, sp, 16
        ret
