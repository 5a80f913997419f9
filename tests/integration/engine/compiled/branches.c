/* Branches taken and not, near and far, by tables and pointers, in recursion. */
#include "freestanding.h"

#define ROUNDS 60000

typedef u64 (*step)(u64, u64);
#define STEPS(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
#define STEP(n)                                                                                    \
    __attribute__((noinline)) static u64 step##n(u64 a, u64 b)                                     \
    {                                                                                              \
        if ((i64)a < (i64)b) return a * (2 * n + 1) ^ b;                                           \
        if (a < b) return (a >> n) - b;                                                            \
        if ((a & b) == n) return ~a;                                                               \
        return a + (b << n) + n;                                                                   \
    }
STEPS(STEP)
#define NAME(n) step##n,
static const step table[16] = {STEPS(NAME)};

__attribute__((noinline)) static u64 ackermann(u64 m, u64 n)
{
    if (!m) return n + 1;
    if (!n) return ackermann(m - 1, 1);
    return ackermann(m - 1, ackermann(m, n - 1));
}

__attribute__((noinline)) static u64 chosen(u64 a, u64 which)
{
    switch (which % 23) {
    case 0: return a + 1;
    case 1: return a ^ 0x55;
    case 2: return a << 3;
    case 3: return a >> 5;
    case 4: return -a;
    case 5: return ~a;
    case 6: return a * a;
    case 7: return a | 1;
    case 8: return a & ~7UL;
    case 9: return (u32)a;
    case 10: return (i32)a;
    case 11: return (u16)a;
    case 13: return a / 7;
    case 14: return a % 1009;
    case 15: return (i64)a / -3;
    case 16: return (i64)a % 17;
    case 17: return a > 1000 ? a : 1000 - a;
    case 19: return __builtin_bswap64(a);
    case 20: return a ? __builtin_ctzl(a) : 99;
    default: return which;
    }
}

/* A small machine whose instructions are labels. */
__attribute__((noinline)) static u64 threaded(u64 a)
{
    static const void *const labels[] = {&&one, &&two, &&three, &&four, &&five, &&end};
    int left = 400;
    goto *labels[a % 5];
one:
    a += 7;
    goto *labels[--left > 0 ? a % 5 : 5];
two:
    a ^= a << 1;
    goto *labels[--left > 0 ? a / 3 % 5 : 5];
three:
    a = a / 3 + 11;
    goto *labels[--left > 0 ? a % 5 : 5];
four:
    a *= 0x9e3779b97f4a7c15UL;
    goto *labels[--left > 0 ? (a >> 40) % 5 : 5];
five:
    a -= left;
    goto *labels[--left > 0 ? (a ^ a >> 9) % 5 : 5];
end:
    return a;
}

int main(void)
{
    u64 a = 1, taken = 0;
    for (int round = 0; round < ROUNDS; round++) {
        u64 b = any();
        a = table[b & 15](a, b);
        a = chosen(a, b >> 7);
        for (int bit = 0; bit < 64; bit += 1 + (b & 3)) {
            if (b >> bit & 1) taken++;
            else if (a >> bit & 1) taken += 3;
            else continue;
            if (taken % 5 == 0) break;
        }
        if (round % 16 == 0) a ^= threaded(b);
        add(a);
    }
    say("branches", digest);
    say("taken", taken);
    say("ackermann", ackermann(2, 300));
    return 0;
}
