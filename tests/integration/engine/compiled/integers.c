/* Integer kernels: a checksum, a hash, sorting, wide products and quotients, misaligned accesses. */
#include "freestanding.h"

static u32 remainders[256];
static u8 memory[65536 + 16];
static u64 numbers[4096];

static u32 checksum(const u8 *data, u64 size)
{
    u32 value = ~0u;
    for (u64 index = 0; index < size; index++)
        value = remainders[(value ^ data[index]) & 255] ^ value >> 8;
    return ~value;
}

static void sort(u64 *first, i64 count)
{
    if (count < 2) return;
    u64 middle = first[count / 2];
    i64 low = 0, high = count - 1;
    while (low <= high) {
        while (first[low] < middle) low++;
        while (first[high] > middle) high--;
        if (low <= high) {
            u64 other = first[low];
            first[low++] = first[high];
            first[high--] = other;
        }
    }
    sort(first, high + 1);
    sort(first + low, count - low);
}

int main(void)
{
    for (u32 index = 0; index < 256; index++) {
        u32 value = index;
        for (int bit = 0; bit < 8; bit++)
            value = value & 1 ? 0xedb88320u ^ value >> 1 : value >> 1;
        remainders[index] = value;
    }
    for (u64 index = 0; index < sizeof memory; index++)
        memory[index] = any();
    for (int round = 0; round < 8; round++)
        add(checksum(memory + round, 60000));
    say("checksum", digest);
    for (int round = 0; round < 8; round++) {
        for (int index = 0; index < 4096; index++)
            numbers[index] = any() >> (round * 5);
        sort(numbers, 4096);
        for (int index = 0; index < 4096; index++)
            add(numbers[index]);
    }
    say("sort", digest);
    for (int round = 0; round < 20000; round++) {
        u64 x = any() >> (round & 63), y = (any() >> (round * 7 & 63)) | 1;
        unsigned __int128 wide = (unsigned __int128)x * y;
        __int128 mixed = (__int128)(i64)x * (i64)y;
        add((u64)(wide >> 64));
        add((u64)(mixed >> 64));
        add(x / y);
        add(x % y);
        add((i64)x / (i64)y);
        add((i64)x % (i64)y);
        add((u32)x / (u32)y + (i32)x % (i32)(y | 1));
        add(__builtin_popcountl(x) + __builtin_clzl(x | 1) + __builtin_ctzl(y));
        add(__builtin_bswap64(x) ^ (x << (y & 63) | x >> (-y & 63)));
        add((i64)x > (i64)y ? x : y);
        add((x & ~y) | (~x & y << 1));
    }
    say("wide", digest);
    for (u64 index = 0; index < 65536; index += 3) {
        u64 word;
        asm volatile("ld %0, 0(%1)" : "=r"(word) : "r"(memory + index));
        add(word);
        asm volatile("lw %0, 1(%1)" : "=r"(word) : "r"(memory + index));
        add(word);
        asm volatile("lhu %0, 2(%1)" : "=r"(word) : "r"(memory + index));
        add(word);
        asm volatile("sd %0, 5(%1)" : : "r"(word * 3), "r"(memory + index) : "memory");
        asm volatile("sh %0, 3(%1)" : : "r"(word), "r"(memory + index) : "memory");
    }
    say("misaligned", checksum(memory, sizeof memory) ^ digest);
    return 0;
}
