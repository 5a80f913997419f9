/* A ledger of short records in a file or on a bare disk: what is added is on the disk, or is said
 * not to be. One record is one sector, so that none is ever half written. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { RECORD = 512, MOST = 1024 };

static int fail(const char *what)
{
    perror(what);
    return 1;
}

static int add(const char *path, const char *text, int synced)
{
    char record[RECORD] = {0}, there[RECORD];
    int file = open(path, O_RDWR | O_CREAT, 0644);
    off_t at = 0;

    if (file < 0)
        return fail(path);
    while (at < MOST * RECORD && pread(file, there, RECORD, at) == RECORD && there[0])
        at += RECORD;
    strncpy(record, text, RECORD - 1);
    if (pwrite(file, record, RECORD, at) != RECORD)
        return fail(path);
    if (synced && fsync(file) != 0)
        return fail(path);
    return close(file) == 0 ? 0 : fail(path);
}

static int list(const char *path)
{
    char record[RECORD];
    int file = open(path, O_RDONLY);

    if (file < 0)
        return fail(path);
    for (int n = 0; n < MOST && read(file, record, RECORD) == RECORD && record[0]; n++)
        puts(record);
    return close(file) == 0 ? 0 : fail(path);
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "version") == 0)
        return puts("ledger 1.0") < 0;
    if (argc == 3 && strcmp(argv[1], "list") == 0)
        return list(argv[2]);
    if (argc == 4 && strcmp(argv[1], "add") == 0)
        return add(argv[2], argv[3], 1);
    if (argc == 4 && strcmp(argv[1], "add-later") == 0)
        return add(argv[2], argv[3], 0);
    fprintf(stderr, "usage: ledger version | list FILE | add FILE TEXT | add-later FILE TEXT\n");
    return 2;
}
