// SPDX-License-Identifier: GPL-2.0
/*
 * A module that makes its kernel die, or complain, in the way whose name is written to
 * /proc/crasher. For tests of watchdogs only.
 */
#include <linux/delay.h>
#include <linux/module.h>
#include <linux/preempt.h>
#include <linux/proc_fs.h>
#include <linux/sched.h>
#include <linux/uaccess.h>

#define LOCKUP_SECONDS 300

static void soft_lockup(void)
{
	int millisecond;

	preempt_disable();
	for (millisecond = 0; millisecond < LOCKUP_SECONDS * 1000; millisecond++)
		mdelay(1);
	preempt_enable();
}

static noinline void oops(void)
{
	*(volatile int *)8 = 1;
}

static ssize_t crasher_write(struct file *file, const char __user *from, size_t size, loff_t *at)
{
	char how[16] = "";

	if (copy_from_user(how, from, min(size, sizeof(how) - 1)))
		return -EFAULT;
	if (sysfs_streq(how, "oops"))
		oops();
	else if (sysfs_streq(how, "bug"))
		BUG();
	else if (sysfs_streq(how, "warn"))
		WARN(1, "a warning that was asked for\n");
	else if (sysfs_streq(how, "softlockup"))
		soft_lockup();
	else if (sysfs_streq(how, "hungtask")) {
		set_current_state(TASK_UNINTERRUPTIBLE);
		schedule_timeout(LOCKUP_SECONDS * HZ);
	} else
		return -EINVAL;
	return size;
}

static const struct proc_ops crasher_ops = {
	.proc_write = crasher_write,
};

static int __init crasher_init(void)
{
	return proc_create("crasher", 0200, NULL, &crasher_ops) ? 0 : -ENOMEM;
}

static void __exit crasher_exit(void)
{
	remove_proc_entry("crasher", NULL);
}

module_init(crasher_init);
module_exit(crasher_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Dies as it is told");
