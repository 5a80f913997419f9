/* Kernels for the engine and for QEMU, on the bare "virt" board: no library, M mode, one hart.
 *
 * The board's loader jumps to _start; the kernel named by KERNEL runs REPEAT times; the result is
 * printed on the UART in hexadecimal, and the board is switched off.
 */
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

#define UART ((volatile u8 *)0x10000000)
#define POWER ((volatile u32 *)0x100000)
#define POWER_OFF 0x5555

static u64 state = 88172645463325252UL;

static u64 random64(void) /* xorshift, Marsaglia 2003 */
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

#ifdef KERNEL_INTEGER
/* CRC-32 of a buffer by a table, and quicksort of pseudo-random numbers. */
static u32 table[256];
static u8 buffer[65536];
static int numbers[8192];

static void make_table(void)
{
    for (u32 i = 0; i < 256; i++) {
        u32 crc = i;
        for (int bit = 0; bit < 8; bit++)
            crc = crc & 1 ? 0xEDB88320u ^ (crc >> 1) : crc >> 1;
        table[i] = crc;
    }
}

static void sort(int *array, int low, int high)
{
    while (low < high) {
        int pivot = array[(low + high) >> 1], i = low, j = high;
        while (i <= j) {
            while (array[i] < pivot)
                i++;
            while (array[j] > pivot)
                j--;
            if (i <= j) {
                int other = array[i];
                array[i++] = array[j];
                array[j--] = other;
            }
        }
        sort(array, low, j);
        low = i;
    }
}

static u64 kernel(void)
{
    u32 crc = ~0u;
    make_table();
    for (u32 i = 0; i < sizeof buffer; i++)
        buffer[i] = random64();
    for (u32 i = 0; i < sizeof buffer; i++)
        crc = table[(crc ^ buffer[i]) & 255] ^ (crc >> 8);
    for (int i = 0; i < 8192; i++)
        numbers[i] = random64();
    sort(numbers, 0, 8191);
    return ((u64)crc << 32) ^ (u32)numbers[random64() & 8191];
}
#endif

#ifdef KERNEL_FLOATING
/* Multiplication of matrices of doubles. */
#define SIZE 32
static double a[SIZE][SIZE], b[SIZE][SIZE], c[SIZE][SIZE];

static u64 kernel(void)
{
    union { double number; u64 bits; } sum = { 0 };
    for (int i = 0; i < SIZE; i++)
        for (int j = 0; j < SIZE; j++) {
            a[i][j] = (double)(random64() & 1023) / 3;
            b[i][j] = (double)(random64() & 1023) / 7;
        }
    for (int i = 0; i < SIZE; i++)
        for (int j = 0; j < SIZE; j++) {
            double cell = 0;
            for (int k = 0; k < SIZE; k++)
                cell += a[i][k] * b[k][j];
            c[i][j] = cell;
            sum.number += cell;
        }
    return sum.bits;
}
#endif

#ifdef KERNEL_ROOTS
/* Singles and doubles: divisions, roots, comparisons and conversions. */
static double root(double x)
{
    double result;
    __asm__("fsqrt.d %0, %1" : "=f"(result) : "f"(x));
    return result;
}

static u64 kernel(void)
{
    union { double number; u64 bits; } sum = { 0 };
    float longest = 0;
    int whole = 0;
    for (int i = 0; i < 20000; i++) {
        u64 random = random64();
        double x = (double)(int)(random & 0xffff) / 65536, y = (double)(random >> 48) / 60000;
        double radius = root(x * x + y * y);
        float skewed = (float)radius * 1.5f - (float)x / ((float)y + 0.25f);
        if (radius < 1)
            sum.number += 1 / (1 + radius);
        if (skewed > longest)
            longest = skewed;
        whole += (int)(skewed * 100);
    }
    return sum.bits ^ (u64)whole ^ (u64)(longest * 1000000);
}
#endif

#ifdef KERNEL_DEVICE
/* The UART's scratch register, written and read. */
static u64 kernel(void)
{
    u64 sum = 0;
    for (int i = 0; i < 1000; i++) {
        UART[7] = i;
        sum += UART[7];
    }
    return sum;
}
#endif

#ifdef KERNEL_CLAIM
/* Interrupts claimed from the PLIC and completed: the UART's, whenever its transmitter is empty. */
#define PRIORITY ((volatile u32 *)0xc000000)
#define ENABLE ((volatile u32 *)0xc002000)
#define CLAIM ((volatile u32 *)0xc200004)
static u64 kernel(void)
{
    u64 sum = 0;
    PRIORITY[10] = 1;
    ENABLE[0] = 1 << 10;
    for (int i = 0; i < 1000; i++) {
        u32 source = *CLAIM;
        sum += source + ENABLE[0];
        *CLAIM = source;
    }
    return sum;
}
#endif

#ifdef KERNEL_MEMORY
/* A walk through 8 MiB in an order that no cache or TLB foresees. */
#define WORDS (1 << 20)
static u64 cells[WORDS];

static u64 kernel(void)
{
    u64 place = random64() & (WORDS - 1), sum = 0;
    for (int i = 0; i < 200000; i++) {
        sum += cells[place] += i;
        place = (place * 5 + sum + 12345) & (WORDS - 1);
    }
    return sum;
}
#endif

void main(void)
{
    u64 result = 0;
    for (int i = 0; i < REPEAT; i++)
        result = result * 31 + kernel();
    for (int shift = 60; shift >= 0; shift -= 4)
        *UART = "0123456789abcdef"[(result >> shift) & 15];
    *UART = '\n';
    *POWER = POWER_OFF;
    for (;;)
        ;
}

static char stack[65536] __attribute__((aligned(16), used));
__asm__(".section .text.start\n"
        ".globl _start\n"
        "_start: lla sp, stack + 65536\n"
        "li t0, 1 << 13\n" /* mstatus.FS: floating point is on */
        "csrs mstatus, t0\n"
        "j main\n"
        ".text\n");
