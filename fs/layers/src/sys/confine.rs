//! Withdraws from a process, and from the programs that it executes, what would let them act on the session of the user
//! that started it: its terminal and its keys.
#![allow(unsafe_code)]

use nix::sys::signal::{SigHandler, Signal, signal};

use crate::error::{Errno, Result};

/// Architectures of system calls (linux/audit.h), each with the numbers of ioctl(2).
const IOCTLS: [(u32, &[u32]); 5] = [
    // The second number is that of the x32 ABI.
    (0xc000_003e, &[16, 0x4000_0202]),
    (0x4000_0003, &[54]),
    (0xc000_00b7, &[29]),
    (0x4000_0028, &[54]),
    (0xc000_00f3, &[29]),
];

/// Requests that insert input into a terminal: TIOCSTI, and TIOCLINUX, which pastes on a console.
const INSERTING: [u32; 2] = [0x5412, 0x541c];

/// The positions in struct seccomp_data: the system call, the architecture, and the second argument. The kernel looks at
/// the low 32 bits of the request only.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const REQUEST: u32 = if cfg!(target_endian = "little") {
    24
} else {
    28
};

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

fn instruction(code: u32, value: u32, (then, otherwise): (u8, u8)) -> libc::sock_filter {
    libc::sock_filter {
        // The codes of classic BPF have 16 bits.
        code: u16::try_from(code).unwrap_or_default(),
        jt: then,
        jf: otherwise,
        k: value,
    }
}

/// Returns the filter. Instructions that compare jump over the next ones by small counts.
fn filter() -> Vec<libc::sock_filter> {
    let allow = instruction(RETURN, libc::SECCOMP_RET_ALLOW, (0, 0));
    let refusal = libc::SECCOMP_RET_ERRNO | libc::EPERM.unsigned_abs();
    let refuse = instruction(RETURN, refusal, (0, 0));
    // The check of the request, which each architecture repeats.
    let mut check = vec![instruction(LOAD, REQUEST, (0, 0))];
    for request in INSERTING {
        check.push(instruction(IF_EQUAL, request, (0, 1)));
        check.push(refuse);
    }
    check.push(allow);
    let mut program = vec![instruction(LOAD, ARCHITECTURE, (0, 0))];
    for (architecture, numbers) in IOCTLS {
        let mut block = vec![instruction(LOAD, NUMBER, (0, 0))];
        for (index, number) in (1_u8..).zip(numbers) {
            // To the check, over the remaining comparisons and the instruction that allows other calls.
            let to_check = u8::try_from(numbers.len()).unwrap_or_default() - index + 1;
            block.push(instruction(IF_EQUAL, *number, (to_check, 0)));
        }
        block.push(allow);
        block.extend(check.iter().copied());
        let length = u8::try_from(block.len()).unwrap_or_default();
        program.push(instruction(IF_EQUAL, architecture, (0, length)));
        program.append(&mut block);
    }
    program.push(allow);
    program
}

/// Makes requests that insert input into a terminal fail with EPERM, in this thread and its children.
///
/// Needs CAP_SYS_ADMIN in the user namespace. Unlike with `no_new_privs`, set-user-ID programs keep their effect.
pub fn deny_input_to_terminals() -> Result<()> {
    let mut instructions = filter();
    let program = libc::sock_fprog {
        len: u16::try_from(instructions.len()).unwrap_or_default(),
        filter: instructions.as_mut_ptr(),
    };
    let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, 0_u32);
    // SAFETY: `program` describes the instructions, which live until the call returns; the kernel only reads both.
    let done = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    match done {
        0 => Ok(()),
        _ => Err(nix::errno::Errno::last().into()),
    }
}

/// Makes the descriptors from this number on invisible to the programs that this process executes.
pub fn close_on_exec_from(first: u32) -> Result<()> {
    let (last, flags) = (libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC);
    // SAFETY: the call accesses no memory, and only changes a flag of descriptors that takes effect at execve(2).
    let done = unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) };
    if done == 0 {
        return Ok(());
    }
    // Before Linux 5.11.
    let io_error = |error: std::io::Error| Errno::from_io_error(&error).unwrap_or(Errno::IO);
    for entry in std::fs::read_dir("/proc/self/fd").map_err(io_error)? {
        let name = entry.map_err(io_error)?.file_name();
        let number = name.to_str().and_then(|name| name.parse::<u32>().ok());
        let Some(number) = number.filter(|number| *number >= first) else {
            continue;
        };
        // SAFETY: the call accesses no memory. A number that was closed meanwhile is an error, which has no effect.
        unsafe { libc::fcntl(number.cast_signed(), libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    Ok(())
}

/// Gives the signals of a terminal their default actions: a shell starts programs in the background with both ignored, and
/// then a program in a session of its own could not be interrupted.
pub fn reset_terminal_signals() -> Result<()> {
    for number in [Signal::SIGINT, Signal::SIGQUIT] {
        // SAFETY: the default action runs no code of this process.
        unsafe { signal(number, SigHandler::SigDfl) }?;
    }
    Ok(())
}

/// Leaves the session keyring of the user that started this process, for a new one. A kernel without keyrings has none.
pub fn leave_session_keyring() -> Result<()> {
    let no_name = std::ptr::null::<libc::c_char>();
    let operation = libc::KEYCTL_JOIN_SESSION_KEYRING;
    // SAFETY: the operation takes no name here, so the kernel accesses no memory of this process.
    let done = unsafe { libc::syscall(libc::SYS_keyctl, operation, no_name) };
    match nix::errno::Errno::last() {
        _ if done >= 0 => Ok(()),
        nix::errno::Errno::ENOSYS => Ok(()),
        error => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Executes the filter, as the kernel does.
    fn run(architecture: u32, number: u32, request: u32) -> u32 {
        let program = filter();
        let (mut at, mut loaded) = (0, 0);
        loop {
            let one = program[at];
            at += 1;
            match u32::from(one.code) {
                LOAD => {
                    loaded = match one.k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        REQUEST => request,
                        other => panic!("offset {other}"),
                    }
                }
                IF_EQUAL if loaded == one.k => at += usize::from(one.jt),
                IF_EQUAL => at += usize::from(one.jf),
                RETURN => return one.k,
                other => panic!("code {other}"),
            }
        }
    }

    #[test]
    fn only_requests_that_insert_input_are_refused() {
        for (architecture, numbers) in IOCTLS {
            for number in numbers {
                for request in INSERTING {
                    assert_ne!(run(architecture, *number, request), libc::SECCOMP_RET_ALLOW);
                }
                assert_eq!(run(architecture, *number, 0x5401), libc::SECCOMP_RET_ALLOW);
            }
            assert_eq!(run(architecture, 1000, 0x5412), libc::SECCOMP_RET_ALLOW);
        }
        assert_eq!(run(7, 16, 0x5412), libc::SECCOMP_RET_ALLOW);
    }
}
