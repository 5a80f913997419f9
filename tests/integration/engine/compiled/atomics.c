/* Atomic operations of every kind, alone and by four threads at once, whose sum is known. */
#include "freestanding.h"

#define THREADS 4
#define ROUNDS 200000

static u64 counter, spread[8], lock, guarded, reserved;
static u32 words[2];
static i32 running[THREADS];
static u64 stacks[THREADS][2048];

#define ALONE(type, suffix)                                                                        \
    static void alone_##type(void)                                                                 \
    {                                                                                              \
        type cell = any();                                                                         \
        for (int round = 0; round < 4000; round++) {                                               \
            type operand = any();                                                                  \
            u64 old;                                                                               \
            switch (round % 11) {                                                                  \
            case 0: old = __atomic_fetch_add(&cell, operand, __ATOMIC_SEQ_CST); break;             \
            case 1: old = __atomic_fetch_and(&cell, operand, __ATOMIC_ACQUIRE); break;             \
            case 2: old = __atomic_fetch_or(&cell, operand, __ATOMIC_RELEASE); break;              \
            case 3: old = __atomic_fetch_xor(&cell, operand, __ATOMIC_RELAXED); break;             \
            case 4: old = __atomic_exchange_n(&cell, operand, __ATOMIC_ACQ_REL); break;            \
            case 5: asm volatile("amomax." suffix " %0, %2, %1" : "=r"(old), "+A"(cell) : "r"(operand)); break;   \
            case 6: asm volatile("amomin." suffix " %0, %2, %1" : "=r"(old), "+A"(cell) : "r"(operand)); break;   \
            case 7: asm volatile("amomaxu." suffix " %0, %2, %1" : "=r"(old), "+A"(cell) : "r"(operand)); break;  \
            case 8: asm volatile("amominu." suffix " %0, %2, %1" : "=r"(old), "+A"(cell) : "r"(operand)); break;  \
            case 9: {                                                                              \
                type expected = cell;                                                              \
                old = __atomic_compare_exchange_n(&cell, &expected, operand, 0, __ATOMIC_SEQ_CST,  \
                                                  __ATOMIC_SEQ_CST);                               \
                break;                                                                             \
            }                                                                                      \
            default: {                                                                             \
                type expected = ~cell;                                                             \
                old = __atomic_compare_exchange_n(&cell, &expected, operand, 0, __ATOMIC_SEQ_CST,  \
                                                  __ATOMIC_SEQ_CST);                               \
            }                                                                                      \
            }                                                                                      \
            add(old);                                                                              \
            add(cell);                                                                             \
        }                                                                                          \
    }
ALONE(u64, "d")
ALONE(u32, "w")

static void hammer(u64 number)
{
    for (int round = 0; round < ROUNDS; round++) {
        __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED);
        __atomic_fetch_add(&spread[(round + number) % 8], number + 1, __ATOMIC_ACQ_REL);
        __atomic_fetch_add(&words[round & 1], 3, __ATOMIC_SEQ_CST);
        u64 was, failed;
        do
            asm volatile("lr.d.aq %0, %2\n addi %0, %0, 5\n sc.d.rl %1, %0, %2"
                         : "=&r"(was), "=&r"(failed), "+A"(reserved) : : "memory");
        while (failed);
        if (round % 8 == 0) {
            while (__atomic_exchange_n(&lock, 1, __ATOMIC_ACQUIRE))
                if (round % 64 == 0) system_call(124, 0, 0, 0, 0, 0); /* sched_yield */
            guarded = guarded + 1;
            __atomic_store_n(&lock, 0, __ATOMIC_RELEASE);
        }
    }
}

/* CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, CHILD_CLEARTID. */
static long begin(u64 number)
{
    register long a0 asm("a0") = 0x250f00, a1 asm("a1") = (long)&stacks[number][2048];
    register long a2 asm("a2") = 0, a3 asm("a3") = 0, a4 asm("a4") = (long)&running[number];
    register long a7 asm("a7") = 220, s1 asm("s1") = number, s2 asm("s2") = (long)hammer;
    asm volatile("ecall\n bnez a0, 1f\n mv a0, s1\n jalr s2\n li a0, 0\n li a7, 93\n ecall\n 1:"
                 : "+r"(a0) : "r"(a1), "r"(a2), "r"(a3), "r"(a4), "r"(a7), "r"(s1), "r"(s2)
                 : "memory", "ra");
    return a0;
}

int main(void)
{
    alone_u64();
    alone_u32();
    say("alone", digest);
    for (u64 number = 0; number < THREADS; number++) {
        running[number] = 1;
        if (begin(number) < 0) leave(1);
    }
    for (int number = 0; number < THREADS; number++)
        while (__atomic_load_n(&running[number], __ATOMIC_ACQUIRE))
            system_call(98, (long)&running[number], 0, 1, 0, 0); /* futex, wait */
    u64 all = 0;
    for (int index = 0; index < 8; index++)
        all += spread[index];
    say("counter", counter);
    say("spread", all);
    say("words", words[0] + (u64)words[1]);
    say("reserved", reserved);
    say("guarded", guarded);
    return 0;
}
