/* Reads numbers, one to a line, and prints their sum; what is no number ends it with status 2. */
#include <stdio.h>
#include <stdlib.h>

int main(void)
{
    char line[64];
    long sum = 0;

    while (fgets(line, sizeof line, stdin)) {
        char *end;
        long number = strtol(line, &end, 10);
        if (end == line || (*end && *end != '\n')) {
            fprintf(stderr, "no number: %s", line);
            return 2;
        }
        sum += number;
    }
    printf("%ld\n", sum);
    return 0;
}
