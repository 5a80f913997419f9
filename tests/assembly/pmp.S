/* Physical memory protection: for each way to match an address, what may be done there and next to
 * it; entries' order; locked entries; M mode's own accesses, MPRV, page walks; what is kept.
 * RISC-V privileged 1.12, 3.7.1.
 *
 * A line is one configuration: a character for each access, privilege and address; '.' where it was
 * allowed, 'x' where it was refused with the right cause and address, else what the cause was.
 */
#include "harness.h"

#define OFF 0
#define TOR 8
#define NA4 16
#define NAPOT 24
#define LOCKED 128

main:
        call set_up
        call matches
        call order
        call walks
        call kept
        call locked
        j finish

/* Entry 15 lets everybody do everything; entries 0 to 3 are the tests'. */
set_up:
        la t0, area
        li t1, 0x73             /* an ecall wherever there is a jump to */
        li t2, 128
1:      sd t1, (t0)
        addi t0, t0, 8
        addi t2, t2, -1
        bnez t2, 1b
        li t0, -1
        csrw pmpaddr15, t0
        li t0, 0x1f << 56
        csrw pmpcfg2, t0
        csrw pmpcfg0, zero
        ret

do_load:
        lw a1, (a0)
        ecall
do_store:
        sw a1, (a0)
        ecall
do_fetch:
        jr a0
do_load_wide:
        ld a1, (a0)
        ecall
        .section .rodata
        .balign 8
snippets:
        .dword do_load, do_store, do_fetch, do_load_wide
causes: .byte 5, 7, 1, 5
        .section .text

/* One line of characters for a0: first and last offset in the area, step 4, in s2 and s3. */
line:
        addi sp, sp, -16
        sd ra, (sp)
        li s4, 3                /* privilege */
1:      li s5, 0                /* access */
2:      mv s6, s2               /* offset */
3:      la a0, area
        add a0, a0, s6
        mv s7, a0
        li a1, 0x73
        la t0, snippets
        slli t1, s5, 3
        add t0, t0, t1
        ld t0, (t0)
        mv t1, s4
        call enter
        la t0, record
        ld t1, CAUSE(t0)
        ld t2, TVAL(t0)
        li a0, '.'
        li t0, 11
        beq t1, t0, 4f
        li t0, 9
        beq t1, t0, 4f
        li t0, 8
        beq t1, t0, 4f
        addi a0, t1, 'A'
        la t0, causes
        add t0, t0, s5
        lbu t0, (t0)
        bne t0, t1, 4f
        li a0, 'x'
        beq t2, s7, 4f
        li a0, '?'
4:      call put
        addi s6, s6, 4
        ble s6, s3, 3b
        addi s5, s5, 1
        li t0, 4
        blt s5, t0, 2b
        addi s4, s4, -1
        li t0, 2
        bne s4, t0, 5f
        li s4, 1
5:      bgez s4, 1b
        call end_line
        ld ra, (sp)
        addi sp, sp, 16
        ret

        .macro address number, offset, ones=0
        la t0, area
        li t1, \offset
        add t0, t0, t1
        srli t0, t0, 2
        ori t0, t0, \ones
        csrw pmpaddr\number, t0
        .endm

/* Each kind of match with each set of permissions: 16 bytes at offset 16. */
matches:
        addi sp, sp, -16
        sd ra, (sp)
        li s2, 0
        li s3, 44
        li s8, 0                /* permissions */
1:      andi t0, s8, 3
        li t1, 2
        beq t0, t1, 2f          /* W without R is reserved */
        show "permissions", s8
        address 0, 16, 1        /* NAPOT: 16 bytes */
        addi t0, s8, NAPOT
        csrw pmpcfg0, t0
        call line
        address 0, 16
        addi t0, s8, NA4
        csrw pmpcfg0, t0
        call line
        address 0, 16
        address 1, 32
        addi t0, s8, TOR
        slli t0, t0, 8
        csrw pmpcfg0, t0
        call line
        address 0, 16           /* TOR from 0 on */
        addi t0, s8, TOR
        csrw pmpcfg0, t0
#ifndef WHOLE
        /* The programs' own code must stay executable. */
        li t1, 7
        bne s8, t1, 3f
#endif
        call line
3:      address 0, 32           /* an empty range */
        address 1, 16
        addi t0, s8, TOR
        slli t0, t0, 8
        csrw pmpcfg0, t0
        call line
2:      csrw pmpcfg0, zero
        addi s8, s8, 1
        li t0, 8
        blt s8, t0, 1b
        ld ra, (sp)
        addi sp, sp, 16
        ret

/* The entry of the lowest number that matches any byte decides, and has to match them all. */
order:
        addi sp, sp, -16
        sd ra, (sp)
        address 0, 16           /* 4 bytes for nothing in 16 bytes to read and write */
        address 1, 16, 1
        li t0, (NAPOT + 3) << 8 | NA4
        csrw pmpcfg0, t0
        call line
        li t0, NAPOT << 8 | (NA4 + 7)
        csrw pmpcfg0, t0
        call line
        address 0, 16, 1
        address 1, 20
        li t0, NA4 << 8 | (NAPOT + 7)
        csrw pmpcfg0, t0
        call line
        /* Neighbours: an access over both matches neither wholly. */
        address 0, 16
        address 1, 20
        li t0, (NA4 + 7) << 8 | (NA4 + 7)
        csrw pmpcfg0, t0
        call line
        /* TOR after NAPOT takes its address as it is written. */
        address 0, 16, 1
        address 1, 40
        li t0, (TOR + 1) << 8 | (NAPOT + 4)
        csrw pmpcfg0, t0
        call line
        /* Nothing matches: M mode may, the others not. */
        csrw pmpcfg0, zero
        la t0, _start
        srli t0, t0, 2
        csrw pmpaddr0, t0
        address 1, 0
        li t0, (TOR + 7) << 8
        csrw pmpcfg0, t0
        csrw pmpcfg2, zero
        call line
        li t0, 0x1f << 56
        csrw pmpcfg2, t0
        csrw pmpcfg0, zero
        ld ra, (sp)
        addi sp, sp, 16
        ret

/* A page walk reads and writes with S mode's permissions; MPRV accesses with those it lends. */
walks:
        addi sp, sp, -16
        sd ra, (sp)
        la t0, root
        li t1, (0x80000000 >> 12 << 10) | V | R | W | X
        sd t1, 16(t0)
        srli t0, t0, 12
        li t1, 8 << 60
        or t0, t0, t1
        csrw satp, t0
        sfence.vma
        .irp permissions, 0, 1, 3
        la t0, root
        li t1, (0x80000000 >> 12 << 10) | V | R | W | X
        sd t1, 16(t0)
        srli t0, t0, 2
        ori t0, t0, 0x1ff       /* the table's page */
        csrw pmpaddr0, t0
        li t0, NAPOT + \permissions
        csrw pmpcfg0, t0
        sfence.vma
        la a0, area
        run do_load, 1
        show_trap "walk through \permissions", do_load
        csrw pmpcfg0, zero
        ld a1, root + 16
        show "entry", a1
        .endr
        csrw satp, zero
        sfence.vma
        /* As S and as U, without translation. */
        address 0, 16, 1
        li t0, NAPOT + 1
        csrw pmpcfg0, t0
        .irp lent, 0, 1, 3
        .irp instruction, lw, sw
        la t0, record
        la t1, 1f
        sd t1, 32(t0)
        la a0, area
        li t0, MPP
        csrc mstatus, t0
        li t0, (\lent << 11) | MPRV
        csrs mstatus, t0
        \instruction a1, 16(a0)
        ecall
        .balign 4
1:      show_record "\instruction as \lent", CAUSE
        .endr
        .endr
        csrw pmpcfg0, zero
        ld ra, (sp)
        addi sp, sp, 16
        ret

/* What is kept of what is written. */
kept:
        addi sp, sp, -16
        sd ra, (sp)
        li s2, 0
1:      csrw pmpcfg0, zero
        slli t0, s2, 8
        csrw pmpcfg0, t0
        csrr s3, pmpcfg0
        csrw pmpcfg0, zero
        show "configuration", s3
        addi s2, s2, 1
        li t0, 0x20
        blt s2, t0, 1b
        .irp pattern, 0, -1, 0x5555555555555555, 0xaaaaaaaaaaaaaaaa
        li t0, \pattern
        csrw pmpaddr3, t0
        show_csr "address after \pattern", pmpaddr3
        .endr
        li t0, 0x6060           /* bits 5 and 6 */
        csrw pmpcfg0, t0
        show_csr "reserved bits", pmpcfg0
        csrw pmpcfg0, zero
        li t0, 0x1f18
        csrw pmpcfg0, t0
        show_csr "several", pmpcfg0
        csrw pmpcfg0, zero
        ld ra, (sp)
        addi sp, sp, 16
        ret

/* Locked: M mode is bound as well, and neither it nor, before a TOR, the address below changes. */
locked:
        addi sp, sp, -16
        sd ra, (sp)
        li s2, 0
        li s3, 44
        address 0, 16, 1
        li t0, LOCKED + NAPOT + 1
        csrw pmpcfg0, t0
        call line
        csrw pmpaddr0, zero
        csrw pmpcfg0, zero
        csrr a1, pmpaddr0
        la a0, area
        srli a0, a0, 2
        sub a1, a1, a0
        show "locked address", a1
        show_csr "locked configuration", pmpcfg0
        address 2, 32
        address 3, 40
        li t0, LOCKED + TOR + 5
        slli t0, t0, 24
        csrw pmpcfg0, t0
        show_csr "locked range", pmpcfg0
        li t0, 0x1234
        csrw pmpaddr1, t0
        csrw pmpaddr2, t0
        csrw pmpaddr3, t0
        show_csr "not locked", pmpaddr1
        csrr a1, pmpaddr2
        la a0, area
        srli a0, a0, 2
        sub a1, a1, a0
        show "start of a locked range", a1
        csrr a1, pmpaddr3
        la a0, area
        srli a0, a0, 2
        sub a1, a1, a0
        show "end of a locked range", a1
        call line
        li t0, -1
        csrw pmpcfg0, t0
        show_csr "the others can be written", pmpcfg0
        ld ra, (sp)
        addi sp, sp, 16
        ret

        .section .bss
        .balign 4096
root:   .space 4096
area:   .space 4096
