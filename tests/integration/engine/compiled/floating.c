/* Floating point as compilers use it: kernels in both precisions, and edge values in every rounding
 * mode with the flags they leave. */
#include "freestanding.h"

#define SIZE 40

static double a[SIZE][SIZE], b[SIZE][SIZE], c[SIZE][SIZE];
static float singles[512];

static u64 bits(double number)
{
    u64 made;
    __builtin_memcpy(&made, &number, 8);
    return made;
}

static u32 bits_single(float number)
{
    u32 made;
    __builtin_memcpy(&made, &number, 4);
    return made;
}

static double of(u64 made)
{
    double number;
    __builtin_memcpy(&number, &made, 8);
    return number;
}

static float of_single(u32 made)
{
    float number;
    __builtin_memcpy(&number, &made, 4);
    return number;
}

static void matrices(void)
{
    for (int i = 0; i < SIZE; i++)
        for (int j = 0; j < SIZE; j++) {
            a[i][j] = (double)(i64)any() / 3e17;
            b[i][j] = (i + 1.0) / (j + 2.0);
        }
    for (int round = 0; round < 4; round++)
        for (int i = 0; i < SIZE; i++)
            for (int j = 0; j < SIZE; j++) {
                double sum = 0;
                for (int k = 0; k < SIZE; k++)
                    sum += a[i][k] * b[k][j];
                c[i][j] = sum / SIZE;
                add(bits(c[i][j]));
            }
}

static void series(void)
{
    for (int index = 1; index < 400; index++) {
        double x = index * 0.37, root = x, exponential = 1, term = 1;
        for (int round = 0; round < 12; round++) {
            root = (root + x / root) / 2;
            term *= x / (round + 1);
            exponential += term;
        }
        add(bits(root));
        add(bits(exponential));
        add(bits(__builtin_sqrt(x)));
        add(bits(__builtin_fma(x, root, -x)));
        add(bits_single(__builtin_fmaf((float)x, (float)root, 1.5f)));
        add((u64)(i64)(x * 1e6));
        add((u64)(x * 1e15));
        add((u64)(u32)(i32)(x * -1e3));
    }
    for (int index = 0; index < 512; index++)
        singles[index] = (float)(i32)any() / 7.0f;
    for (int stride = 1; stride < 512; stride *= 2)
        for (int index = 0; index + stride < 512; index += 2 * stride) {
            float x = singles[index], y = singles[index + stride];
            singles[index] = x * 0.75f + y * 0.25f;
            singles[index + stride] = x < y ? x - y : __builtin_sqrtf(x > 0 ? x : -x);
        }
    for (int index = 0; index < 512; index++)
        add(bits_single(singles[index]));
}

static const u64 wide[] = {
    0, 1, 0xfffffffffffff, 0x10000000000000, 0x3cb0000000000000, 0x3fefffffffffffff,
    0x3ff0000000000000, 0x3ff0000000000001, 0x4000000000000000, 0x41dfffffffc00000,
    0x41e0000000000000, 0x43dfffffffffffff, 0x43e0000000000000, 0x7fefffffffffffff,
    0x7ff0000000000000, 0x7ff0000000000001, 0x7ff8000000000000, 0x3810000000000000,
    0x36a0000000000000, 0x47efffffe0000000, 0x47efffffefffffff, 0x47effffff0000000,
};
static const u32 narrow[] = {
    0, 1, 0x7fffff, 0x800000, 0x34000000, 0x3f7fffff, 0x3f800000, 0x3f800001, 0x40000000,
    0x4effffff, 0x4f000000, 0x5f000000, 0x7f7fffff, 0x7f800000, 0x7f800001, 0x7fc00000,
};
#define COUNT(table) (sizeof table / sizeof *table)
#define DO(text, to, from)                                                                         \
    asm volatile("fsflags zero\n" text "\n frflags %1" : to, "=r"(flags) : from); add(flags)

static void edges(void)
{
    for (u64 mode = 0; mode < 5; mode++) {
        asm volatile("fsrm %0" : : "r"(mode));
        for (u64 i = 0; i < 2 * COUNT(wide); i++) {
            double x = of(wide[i / 2] | i << 63), r;
            u64 flags, n;
            float s;
            DO("fsqrt.d %0, %2", "=f"(r), "f"(x)); add(bits(r));
            DO("fcvt.w.d %0, %2", "=r"(n), "f"(x)); add(n);
            DO("fcvt.wu.d %0, %2", "=r"(n), "f"(x)); add(n);
            DO("fcvt.l.d %0, %2", "=r"(n), "f"(x)); add(n);
            DO("fcvt.lu.d %0, %2", "=r"(n), "f"(x)); add(n);
            DO("fcvt.s.d %0, %2", "=f"(s), "f"(x)); add(bits_single(s));
            DO("fclass.d %0, %2", "=r"(n), "f"(x)); add(n);
            for (u64 j = 0; j < 2 * COUNT(wide); j++) {
                double y = of(wide[j / 2] | j << 63);
                asm volatile("fsflags zero\n fadd.d %0, %2, %3\n frflags %1" : "=f"(r), "=r"(flags) : "f"(x), "f"(y)); add(flags); add(bits(r));
                asm volatile("fsflags zero\n fmul.d %0, %2, %3\n frflags %1" : "=f"(r), "=r"(flags) : "f"(x), "f"(y)); add(flags); add(bits(r));
                asm volatile("fsflags zero\n fdiv.d %0, %2, %3\n frflags %1" : "=f"(r), "=r"(flags) : "f"(x), "f"(y)); add(flags); add(bits(r));
                asm volatile("fsflags zero\n fmin.d %0, %2, %3\n frflags %1" : "=f"(r), "=r"(flags) : "f"(x), "f"(y)); add(flags); add(bits(r));
                asm volatile("fsflags zero\n fle.d %0, %2, %3\n frflags %1" : "=r"(n), "=r"(flags) : "f"(x), "f"(y)); add(flags); add(n);
                asm volatile("fsflags zero\n fmadd.d %0, %2, %3, %2\n frflags %1" : "=f"(r), "=r"(flags) : "f"(x), "f"(y)); add(flags); add(bits(r));
            }
        }
        for (u64 i = 0; i < 2 * COUNT(narrow); i++)
            for (u64 j = 0; j < 2 * COUNT(narrow); j++) {
                float x = of_single(narrow[i / 2] | i << 31), y = of_single(narrow[j / 2] | j << 31), r;
                u64 flags;
                asm volatile("fsflags zero\n fsub.s %0, %2, %3\n frflags %1" : "=f"(r), "=r"(flags) : "f"(x), "f"(y)); add(flags); add(bits_single(r));
                asm volatile("fsflags zero\n fmul.s %0, %2, %3\n frflags %1" : "=f"(r), "=r"(flags) : "f"(x), "f"(y)); add(flags); add(bits_single(r));
                asm volatile("fsflags zero\n fdiv.s %0, %2, %3\n frflags %1" : "=f"(r), "=r"(flags) : "f"(x), "f"(y)); add(flags); add(bits_single(r));
                asm volatile("fsflags zero\n fnmsub.s %0, %2, %3, %3\n frflags %1" : "=f"(r), "=r"(flags) : "f"(x), "f"(y)); add(flags); add(bits_single(r));
            }
        say("mode", mode);
        say("edges", digest);
    }
    asm volatile("fsrm zero");
}

int main(void)
{
    matrices();
    say("matrices", digest);
    series();
    say("series", digest);
    edges();
    return 0;
}
