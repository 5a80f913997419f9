// SPDX-License-Identifier: GPL-2.0
/* A module that says hello through a parameter file, for the plan beside it. */
#include <linux/init.h>
#include <linux/kernel.h>
#include <linux/module.h>

static int answer = 42;
module_param(answer, int, 0444);
MODULE_PARM_DESC(answer, "what /sys/module/hello/parameters/answer says");

static int __init hello_init(void)
{
	pr_info("hello: loaded, the answer is %d\n", answer);
	return answer < 0 ? -EINVAL : 0;
}

static void __exit hello_exit(void)
{
	pr_info("hello: unloaded\n");
}

module_init(hello_init);
module_exit(hello_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("An example of vmlab's");
