//! A copy-up never changes visible times, not even temporarily.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::common::{Lab, WRITE, create_files};
use cowl_overlay::inode::Inode;

#[test]
fn copy_up_changes_no_visible_time() {
    const FILES: usize = 200;
    let lab = Lab::new(|top| {
        let names: Vec<String> = (0..FILES).map(|n| format!("d/{n}")).collect();
        create_files(top, &names.iter().map(String::as_str).collect::<Vec<_>>());
        for number in (0..FILES).step_by(3) {
            let name = top.join(format!("d/{number}"));
            std::fs::hard_link(&name, top.join(format!("d/{number}-two"))).unwrap();
        }
    });
    let fs = lab.open();
    let dir = fs.find("d").unwrap();
    let files: Vec<_> = (0..FILES)
        .map(|number| fs.find(&format!("d/{number}")).unwrap())
        .collect();
    let times = |inode: &Arc<Inode>| {
        let stat = fs.attr_of_inode(inode).unwrap().stat;
        (stat.ctime, stat.mtime, stat.size, stat.nlink)
    };
    let (dir_times, before) = (times(&dir), files.iter().map(times).collect::<Vec<_>>());
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut reads = 0_u32;
            while !done.load(Ordering::Acquire) {
                let now = times(&dir);
                assert_eq!((now.0, now.1), (dir_times.0, dir_times.1));
                for (file, before) in files.iter().zip(&before) {
                    assert_eq!(times(file), *before);
                }
                reads += 1;
            }
            reads
        });
        for number in 0..FILES {
            let handle = fs.open(&format!("d/{number}"), WRITE).unwrap();
            fs.overlay.close(&handle);
        }
        done.store(true, Ordering::Release);
        assert!(reader.join().unwrap() > 0);
    });
}
