/* Sv39 and Sv48: every combination of a leaf's flags, of access, privilege, SUM and MXR, at every
 * level; what a walk leaves in A and D; superpages, reserved bits, canonical addresses, fences.
 * RISC-V privileged 1.12, 4.3 to 4.5.
 *
 * The matrix is one character a case: 'A' + 4 * (what came of it) + 2 * D + A, see `outcomes`.
 */
#include "harness.h"

#define SMALL 0x40000000        /* a page of 4 KiB: level 0 */
#define LARGE 0x40200000        /* of 2 MiB: level 1 */
#define HUGE 0x100000000        /* of 1 GiB: level 2 */
#define USER 0x40000000         /* from where S mode sees code to where U mode does */
#ifdef QUICK
#define STEP 41
#else
#define STEP 1
#endif

        .macro entry table, index, physical, flags
        la t0, \table
        la t1, \physical
        srli t1, t1, 12
        slli t1, t1, 10
        li t2, \flags
        or t1, t1, t2
        li t2, \index * 8
        add t0, t0, t2
        sd t1, (t0)
        .endm

        .macro mode number, table
        li t0, \number
        slli t0, t0, 60
        la t1, \table
        srli t1, t1, 12
        or t0, t0, t1
        csrw satp, t0
        sfence.vma
        .endm

main:
        entry root39, 1, middle, V
        li t1, (0x80000000 >> 12 << 10) | V | R | W | X | A | D
        la t0, root39
        sd t1, 16(t0)
        ori t1, t1, U
        sd t1, 24(t0)
        entry middle, 0, leaves, V
        entry root48, 0, root39, V
        /* At every offset that is looked at there is an ecall, also in the large pages. */
        la t0, page
        li t1, 0x73
        sd t1, (t0)
        li t0, 0x80000000 + (2 << 20)
        sd t1, (t0)
        la t0, page
        srli t0, t0, 12
        slli t0, t0, 10
        la t1, sites
        sd t0, 16(t1)

        mode 8, root39
        call matrix
        mode 9, root48
        call matrix

        mode 8, root39
        call others
        mode 9, root48
        call others
        call spaces
        call lent
        j finish

/* All cases for a leaf at each level. */
matrix:
        addi sp, sp, -16
        sd ra, (sp)
        li s2, 0                /* level */
levels:
        la s3, sites
        slli t0, s2, 5
        add s3, s3, t0
        ld s4, 0(s3)            /* where the entry is */
        ld s5, 8(s3)            /* the virtual address */
        ld s6, 16(s3)           /* the entry without flags */
        li s7, 0                /* flags */
flags:
        li s8, 0                /* access: load, store, fetch */
accesses:
        li s9, 0                /* privilege 0 or 1 */
privileges:
        li s10, 0               /* SUM and MXR */
statuses:
        or t0, s6, s7
        sd t0, (s4)
        sfence.vma
        li t0, SUM | MXR
        csrc mstatus, t0
        slli t0, s10, 18
        csrs mstatus, t0
        la t0, snippets
        slli t1, s8, 3
        add t0, t0, t1
        ld t0, (t0)
        bnez s9, 1f
        li t1, USER
        add t0, t0, t1
1:      mv t1, s9
        mv a0, s5
        call enter
        call outcome
        addi s10, s10, 1
        li t0, 4
        blt s10, t0, statuses
        addi s9, s9, 1
        li t0, 2
        blt s9, t0, privileges
        addi s8, s8, 1
        li t0, 3
        blt s8, t0, accesses
        call end_line
        addi s7, s7, STEP
        li t0, 256
        blt s7, t0, flags
        sd zero, (s4)
        addi s2, s2, 1
        li t0, 3
        blt s2, t0, levels
        ld ra, (sp)
        addi sp, sp, 16
        ret

/* Put what came of a case out as a character. */
outcome:
        la t0, record
        ld t0, CAUSE(t0)
        la t1, outcomes
        li a0, 0
1:      lbu t2, (t1)
        beq t2, t0, 2f
        addi a0, a0, 4
        addi t1, t1, 1
        li t2, 32
        blt a0, t2, 1b
2:      ld t0, (s4)
        srli t0, t0, 6
        andi t0, t0, 3
        add a0, a0, t0
        addi a0, a0, 'A'
        j put

do_load:
        ld a1, (a0)
        ecall
do_store:
        sd zero, 8(a0)
        ecall
do_fetch:
        jr a0

        .section .data
outcomes:
        .byte 8, 9, 12, 13, 15, 1, 5, 7
        .balign 8
snippets:
        .dword do_load, do_store, do_fetch
sites:
        .dword leaves, SMALL, 0, 0
        .dword middle + 8, LARGE, (0x80200000 >> 12 << 10), 0
        .dword root39 + 32, HUGE + (2 << 20), (0x80000000 >> 12 << 10), 0
        .section .text

/* Single cases. `with` puts an entry in place, accesses an address and shows the trap. */
        .macro with text, place, value, address, snippet, privilege
        la s4, \place
        ld s3, (s4)
        li t0, \value
        sd t0, (s4)
        sfence.vma
        li a0, \address
        run \snippet, \privilege
        show_record "\text cause", CAUSE
        show_record "\text tval", TVAL
        ld a1, (s4)
        show "\text entry", a1
        sd s3, (s4)
        sfence.vma
        .endm

#define ALL (V | R | W | X)
#define MEG(n) ((0x80000000 + (n) * 0x200000) >> 12 << 10)
others:
        addi sp, sp, -16
        sd ra, (sp)
        with "2 MiB misaligned by 4 KiB", middle + 8, (MEG(1) + (1 << 10) + ALL), LARGE, do_load, 1
        with "2 MiB misaligned by 1 MiB", middle + 8, (MEG(1) + (256 << 10) + ALL), LARGE, do_store, 1
        with "1 GiB misaligned by 2 MiB", root39 + 32, (MEG(1) + ALL), HUGE, do_load, 1
        with "1 GiB misaligned, fetched", root39 + 32, (MEG(1) + ALL), HUGE, do_fetch, 1
        with "bit 54", leaves, (MEG(1) + ALL + (1 << 54)), SMALL, do_load, 1
        with "bit 60", leaves, (MEG(1) + ALL + (1 << 60)), SMALL, do_load, 1
        with "PBMT", leaves, (MEG(1) + ALL + (1 << 61)), SMALL, do_store, 1
        with "N", leaves, (MEG(1) + ALL + (1 << 63)), SMALL, do_fetch, 1
        with "software bits", leaves, (MEG(1) + ALL + (3 << 8)), SMALL, do_store, 1
        with "global", leaves, (MEG(1) + ALL + G), SMALL, do_load, 1
        with "reserved bit in a pointer", middle, ((1 << 54) + V), SMALL, do_load, 1
        with "pointer to nowhere", middle, ((0x18000000 >> 12 << 10) + V), SMALL, do_load, 1
        with "pointer to nowhere, stored", middle, ((0x18000000 >> 12 << 10) + V), SMALL, do_store, 1
        with "pointer to nowhere, fetched", middle, ((0x18000000 >> 12 << 10) + V), SMALL, do_fetch, 1
        with "page of nowhere", leaves, ((0x18000000 >> 12 << 10) + ALL), SMALL, do_load, 1
        with "page of nowhere, stored", leaves, ((0x18000000 >> 12 << 10) + ALL), SMALL, do_store, 1
        with "page of nowhere, fetched", leaves, ((0x18000000 >> 12 << 10) + ALL), SMALL, do_fetch, 1
        with "global pointer", middle, (MEG(2) + V + G), SMALL, do_load, 1
        with "not canonical: bit 39", leaves, 0, (SMALL + (1 << 39)), do_load, 1
        with "not canonical: bit 63", leaves, 0, (SMALL + (1 << 63)), do_store, 1
        with "not canonical: bit 48", leaves, 0, (SMALL + (1 << 48)), do_fetch, 1
        with "no entry, high half", leaves, 0, (-4096), do_load, 1
        with "no entry, low half's end", leaves, 0, (0x3ffffff000), do_store, 1
        with "across two pages, the second missing", leaves, (MEG(1) + ALL), (SMALL + 4092), do_load, 1
        with "across two pages, the second missing, stored", leaves, (MEG(1) + ALL), (SMALL + 4084), do_store, 1
        with "misaligned in a page", leaves, (MEG(1) + ALL), (SMALL + 1), do_load, 1
        ld ra, (sp)
        addi sp, sp, 16
        ret

/* Address spaces: what a fence must make seen, and that another space's or a global mapping's
 * fence may be left out by nobody. Only what the specification promises is looked at. */
        .macro space number
        csrr t0, satp
        li t1, 0xffff
        slli t1, t1, 44
        not t1, t1
        and t0, t0, t1
        li t1, \number
        slli t1, t1, 44
        or t0, t0, t1
        csrw satp, t0
        .endm

        .macro point page, flags
        la t0, leaves
        la t1, \page
        srli t1, t1, 12
        slli t1, t1, 10
        ori t1, t1, \flags
        sd t1, (t0)
        .endm

        .macro look text
        li a0, SMALL
        run do_load, 1
        show "\text", a1
        .endm

spaces:
        addi sp, sp, -16
        sd ra, (sp)
        la t0, first
        li t1, 0x111
        sd t1, (t0)
        la t0, second
        li t1, 0x222
        sd t1, (t0)
        mode 8, root39
        space 1
        point first, ALL
        look "space 1"
        space 2
        sfence.vma
        point second, ALL
        sfence.vma
        look "space 2"
        space 1
        li a2, 1
        li a3, SMALL
        sfence.vma zero, a2
        look "space 1 after its fence"
        point first, ALL
        sfence.vma a3, zero
        look "after the address's fence in all spaces"
        point second, ALL
        sfence.vma a3, a2
        look "after the address's fence in this space"
        point first, (ALL | G)
        sfence.vma
        look "global"
        space 2
        look "global in space 2"
        point second, ALL
        sfence.vma a3, zero
        look "no longer global"
        /* Svinval does the same in pieces. */
        point first, ALL
        sfence.w.inval
        sinval.vma a3, zero
        sfence.inval.ir
        look "invalidated by address"
        point second, ALL
        sfence.w.inval
        sinval.vma zero, zero
        sfence.inval.ir
        look "invalidated"
        /* Write permission taken, A and D cleared: a fence makes both seen. */
        point first, ALL
        sfence.vma
        li a0, SMALL
        run do_store, 1
        show_record "written", CAUSE
        point first, (V | R)
        sfence.vma a3, zero
        li a0, SMALL
        run do_store, 1
        show_record "no longer writable", CAUSE
        point first, ALL
        sfence.vma a3, zero
        li a0, SMALL
        run do_load, 1
        ld a1, leaves
        show "A alone", a1
        li a0, SMALL
        run do_store, 1
        ld a1, leaves
        show "A and D", a1
        /* How many bits of ASID there are, and which modes satp takes; Sv57 is left to implementations. */
        li t0, -1
        srli t0, t0, 20
        slli t0, t0, 44
        csrr t1, satp
        or t0, t0, t1
        csrw satp, t0
        show_csr "ASID bits", satp
        la s2, modes
1:      ld t0, (s2)
        beqz t0, 2f
        csrw satp, t0
        show_csr "mode", satp
        addi s2, s2, 8
        j 1b
2:      csrw satp, zero
        show_csr "bare", satp
        ld ra, (sp)
        addi sp, sp, 16
        ret
        .section .rodata
        .balign 8
modes:
        .dword 0x8000000000080000, 0x1000000000080001, 0x9000000000080002, 0x7000000000080003
        .dword 0xb000000000080005, 0xf000000000080006, 0
        .section .text

/* M mode with MPRV sees what the mode in MPP does, for loads and stores alone. */
        .macro as_if text, lent, more, instruction
        li t0, MPP | SUM | MXR
        csrc mstatus, t0
        la t0, record
        la t1, 77f
        sd t1, 32(t0)
        li a0, SMALL
        li t1, (\lent << 11) | MPRV | \more
        csrs mstatus, t1
        \instruction
        ecall
77:     show_record "\text", CAUSE
        show_record "\text, status", STATUS
        .endm

lent:
        addi sp, sp, -16
        sd ra, (sp)
        mode 8, root39
        point first, (V | R | U)
        sfence.vma
        as_if "as U", 0, 0, "ld a1, (a0)"
        as_if "as S", 1, 0, "ld a1, (a0)"
        as_if "as S with SUM", 1, SUM, "ld a1, (a0)"
        as_if "as S with SUM, stored", 1, SUM, "sd a1, (a0)"
        as_if "as M", 3, 0, "la a0, first; ld a1, (a0)"
        point first, (V | X)
        sfence.vma
        as_if "as S, executable", 1, 0, "ld a1, (a0)"
        as_if "as S with MXR, executable", 1, MXR, "ld a1, (a0)"
        as_if "as S, atomic", 1, MXR, "amoadd.d a1, a1, (a0)"
        as_if "as S, reserved", 1, MXR, "lr.d a1, (a0)"
        ld ra, (sp)
        addi sp, sp, 16
        ret

        .section .bss
        .balign 4096
root39: .space 4096
root48: .space 4096
middle: .space 4096
leaves: .space 4096
first:  .space 4096
second: .space 4096
        .balign 4096
page:   .space 4096
