//! What the model test found, each in the fewest steps that show it.

use crate::common::Lab;
use cowl_layers::format::XattrSpace;

/// In the user space a fifo or symbolic link can't carry the mark of its number: its copy had two numbers
/// at once, the one that was known and the one that a new look at the name gave.
#[test]
fn what_can_carry_no_mark_keeps_its_number_while_mounted() {
    let lab = Lab::new(|_| {}).in_space(XattrSpace::User);
    let fs = lab.open();
    fs.mkfifo("fifo").unwrap();
    fs.symlink("link", "nowhere").unwrap();
    lab.push(&fs).unwrap();
    let before = ["fifo", "link"].map(|name| fs.number(name));
    fs.chmod("fifo", 0o600).unwrap();
    fs.rename("link", "moved").unwrap();
    let after = || ["fifo", "moved"].map(|name| fs.number(name));
    assert_eq!(after(), before);
    // The listing says the same.
    fs.tree();
    // What was forgotten comes back as the same.
    for number in before {
        fs.overlay.inodes().forget(number, u64::MAX);
    }
    assert_eq!(after(), before);
    fs.tree();
}

/// And the number does not pass to what comes to lie in its place on the disk.
#[test]
fn a_number_that_could_not_be_marked_goes_with_its_object() {
    let lab = Lab::new(|_| {}).in_space(XattrSpace::User);
    let fs = lab.open();
    let names: Vec<String> = (0..20).map(|at| format!("fifo{at}")).collect();
    names.iter().for_each(|name| fs.mkfifo(name).unwrap());
    lab.push(&fs).unwrap();
    for name in &names {
        fs.chmod(name, 0o600).unwrap();
        let number = fs.number(name);
        fs.unlink(name).unwrap();
        // Nobody has it any more, so that its place on the disk is free.
        fs.overlay.inodes().forget(number, u64::MAX);
    }
    // The file system gives freed inodes to the next who asks.
    for at in 0..40 {
        fs.create(&format!("file{at}"), b"x").unwrap();
    }
    // A listing and a look at a name say the same number.
    fs.tree();
}
