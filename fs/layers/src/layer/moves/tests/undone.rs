//! The undo of moves.

use super::*;

/// Fails before each change, and undoes the moves, also by another process.
#[test]
fn moves_can_be_undone_until_all_files_are_linked() {
    for by_other in [true, false] {
        for good in 0.. {
            let lab = Lab::new();
            let (old, upper, moves) = lab.begin();
            fault::arm(good);
            let done = list_and_reserve(&moves, &lab.list).and_then(|()| moves.link(&lab.list));
            fault::disarm();
            let has_list = exists(&lab.path("work/moves/list"));
            moves.cancel().unwrap();
            assert!(!has_list || exists(&lab.path("work/moves/undone")));
            if by_other {
                complete(&upper, Some(&old)).unwrap();
            } else {
                moves.unlink(&lab.list).unwrap();
            }
            lab.assert_unmoved(&format!("after {good} changes"));
            if done.is_ok() {
                break;
            }
        }
    }
}

/// The name in the new layer may be the only durable one.
#[test]
fn undoing_a_move_removes_no_last_name() {
    let lab = Lab::new();
    let (old, upper, moves) = lab.begin();
    moves.commit_list(&lab.list).unwrap();
    sys::node::link(moves.from.as_fd(), b"a", moves.to.as_fd(), b"a").unwrap();
    drop(moves);
    fs::remove_file(lab.path("old/a")).unwrap();
    fs::remove_dir(lab.path("new/d")).unwrap();
    complete(&upper, Some(&old)).unwrap();
    lab.assert_unmoved("without a durable name");
    let new = fs::metadata(lab.path("new")).unwrap();
    assert_eq!((new.mtime(), new.mtime_nsec()), (7, 8));
}

/// After the cancellation, programs change names.
#[test]
fn undoing_a_move_returns_no_name_that_a_program_has_removed() {
    for by_other in [true, false] {
        let lab = Lab::new();
        let (old, upper, moves) = lab.begin();
        list_and_reserve(&moves, &lab.list).unwrap();
        moves.link(&lab.list).unwrap();
        moves.cancel().unwrap();
        fs::remove_file(lab.path("old/a")).unwrap();
        match by_other {
            true => complete(&upper, Some(&old)).unwrap(),
            false => moves.unlink(&lab.list).unwrap(),
        }
        assert!(!exists(&lab.path("old/a")) && !exists(&lab.path("new/a")));
        assert_eq!(names(&lab.path("old")), ["c", "d"]);
    }
}

/// Earlier daemons did not sync the names in the frozen layer before, so the one in the new layer may be the only durable
/// one.
#[test]
fn undoing_a_move_of_an_earlier_daemon_removes_no_last_name() {
    let lab = Lab::new();
    let (old, upper, moves) = lab.begin();
    list_and_reserve(&moves, &lab.list).unwrap();
    moves.link(&lab.list).unwrap();
    moves.cancel().unwrap();
    drop(moves);
    let path = lab.path("work/moves/undone");
    let text = fs::read_to_string(&path).unwrap();
    let earlier = text.replacen("\"names_synced\":true,", "", 1);
    assert_ne!(earlier, text);
    fs::write(&path, earlier).unwrap();
    fs::remove_file(lab.path("old/a")).unwrap();
    complete(&upper, Some(&old)).unwrap();
    lab.assert_unmoved("with a list of an earlier daemon");
}
