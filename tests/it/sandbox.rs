//! Programs of models and authors reach nothing: not the machine's files, not its network,
//! not its processes, not more of it than they are given. And they are useful: they work on
//! the run's files.

use std::os::linux::net::SocketAddrExt;
use std::time::Duration;

use capx_core::domain::outcome::Failure;
use capx_core::domain::run::RunStatus;
use capx_workers::sandbox::{File, Order, Report, Sandbox};
use serde_json::json;

use crate::harness::{Db, SHORT_LEASE, eventually, scratch};

fn sandbox() -> Sandbox {
    Sandbox::new(env!("CARGO_BIN_EXE_capx"))
}

async fn run(argv: &[&str], files: Vec<File>, time: Duration) -> Result<Report, Failure> {
    let argv = argv.iter().map(ToString::to_string).collect();
    sandbox().run(Order { argv, files, ..Order::default() }, time).await
}

async fn sh(script: &str) -> Report {
    run(&["/bin/sh", "-c", script], Vec::new(), Duration::from_secs(20)).await.unwrap()
}

/// Processes of this machine whose command holds a text.
fn processes(text: &str) -> usize {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("cmdline")).ok())
        .filter(|command| String::from_utf8_lossy(command).contains(text))
        .count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_works_on_a_copy_of_the_files() {
    let files = vec![File::new("in/a.txt".into(), b"one\n".to_vec()), File::new("old".into(), b"x".to_vec())];
    let argv = ["/bin/sh", "-c", "cat in/a.txt; echo two > in/b.txt; rm old; echo sad >&2; ln -s /etc link; exit 3"];
    let report = run(&argv, files, Duration::from_secs(20)).await.unwrap();
    assert_eq!(
        (report.exit_code, report.stdout.text.as_str(), report.stderr.text.as_str()),
        (Some(3), "one\n", "sad\n")
    );
    assert_eq!(
        report.files.iter().map(|f| (f.path.as_str(), &f.bytes[..])).collect::<Vec<_>>(),
        [("in/b.txt", &b"two\n"[..])]
    );
    assert_eq!(report.removed, ["old"]);
    assert!(report.left[0].contains("`link` is no regular file"), "{:?}", report.left);
}

/// Each is a line of shell that tells of its success.
const ESCAPES: &[&str] = &[
    "cat /etc/shadow",
    "cat /etc/passwd",
    "cat /proc/1/environ",
    "cat /proc/self/environ",
    "ls /proc/1/root",
    "ls /sys/kernel",
    "ls /root",
    "ls /home",
    "ls /var",
    "ls /run",
    "ls /work/..",
    "ls /dev/shm",
    "cat /dev/mem",
    "cat /dev/kmsg",
    "ls /dev/disk",
    "cat $CANARY",
    "ln -s $CANARY /work/link && cat /work/link",
    "ln $CANARY /work/hard && cat /work/hard",
    "echo x > /usr/bin/capx-was-here",
    "echo x > /lib/capx-was-here",
    "echo x > /etc/ld.so.preload",
    "echo x > /capx-was-here",
    "mkdir /x",
    "mknod /work/mem c 1 1 && head -c1 /work/mem",
    "mount -t proc proc /tmp",
    "mount -o remount,rw /",
    "umount /usr",
    "chroot / /bin/sh -c 'echo x'",
    "unshare -r id",
    "nsenter -t 1 -m ls",
    "setpriv --ambient-caps +sys_admin id",
    "kill -0 $OUTSIDE",
    "kill -9 $OUTSIDE",
    "test -n \"$CAPX_DATABASE_URL$DATABASE_URL$SQLX_OFFLINE$CARGO\"",
    "hostname capx-was-here",
    "date -s 2001-01-01",
    "ulimit -n 100000",
    "ulimit -v unlimited",
    "ulimit -t 100000",
    "ulimit -c unlimited && test \"$(ulimit -c)\" != 0",
    "test -n \"$(ls /proc/*/fd 2>/dev/null)\"",
    "perl -MSocket -e 'socket(S, PF_INET, SOCK_STREAM, 0) or exit 1; connect(S, sockaddr_in($ENV{PORT}, inet_aton(\"127.0.0.1\"))) or exit 1'",
    "perl -MSocket -e 'socket(S, PF_INET, SOCK_DGRAM, 0) or exit 1'",
    "perl -MSocket -e 'socket(S, PF_INET6, SOCK_STREAM, 0) or exit 1'",
    "perl -MSocket -e 'socket(S, PF_UNIX, SOCK_STREAM, 0) or exit 1; connect(S, pack_sockaddr_un(\"\\0capx-$ENV{PORT}\")) or exit 1'",
    "ls /usr/src/*",
    "perl -MSocket -e 'socketpair(A, B, 30, SOCK_STREAM, 0) or exit 1'",
    "perl -e 'open(F, \"+<&=\", $_) and exit 0 for 3..200; exit 1'",
];

#[tokio::test(flavor = "multi_thread")]
async fn no_program_reaches_the_machine() {
    let canary = scratch().join("canary");
    std::fs::create_dir_all(canary.parent().unwrap()).unwrap();
    std::fs::write(&canary, "the machine's own").unwrap();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let name = std::os::unix::net::SocketAddr::from_abstract_name(format!("capx-{port}")).unwrap();
    let socket = std::os::unix::net::UnixListener::bind_addr(&name).unwrap();
    socket.set_nonblocking(true).unwrap();
    // It ends by itself when its input does, whatever becomes of this test.
    let mut outside = std::process::Command::new("cat")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let settings = format!(
        "CANARY={} PORT={port} OUTSIDE={}; PATH=$PATH:/usr/sbin:/sbin; export CANARY PORT OUTSIDE PATH",
        canary.display(),
        outside.id()
    );
    assert!(ESCAPES.len() >= 40);
    // They are refused, and not merely missing.
    let names = "cat ls ln mknod mount umount chroot unshare nsenter setpriv hostname date perl";
    let there =
        sh(&format!("PATH=$PATH:/usr/sbin:/sbin; for name in {names}; do command -v $name; done | wc -l")).await;
    assert_eq!(there.stdout.text.trim(), "13", "{there:?}");
    for escape in ESCAPES {
        let report = sh(&format!("{settings}\n{{ {escape}\n}} && echo ESCAPED; echo tried")).await;
        assert!(report.stdout.text.contains("tried"), "{escape}: {report:?}");
        assert!(!report.stdout.text.contains("ESCAPED"), "{escape}: {report:?}");
        assert!(!report.stdout.text.contains("machine's own"), "{escape}: {report:?}");
    }
    assert!(outside.try_wait().unwrap().is_none(), "a process outside was ended");
    assert!(listener.accept().is_err() && socket.accept().is_err(), "somebody has connected");
    outside.kill().unwrap();
    outside.wait().unwrap();
}

/// Calls of the kernel that are refused before the kernel looks at their arguments, by
/// their numbers.
#[cfg(target_arch = "x86_64")]
const REFUSED: &[(&str, i64)] = &[
    ("socket", libc::SYS_socket),
    ("bind", libc::SYS_bind),
    ("connect", libc::SYS_connect),
    ("accept", libc::SYS_accept),
    ("ptrace", libc::SYS_ptrace),
    ("process_vm_readv", libc::SYS_process_vm_readv),
    ("process_vm_writev", libc::SYS_process_vm_writev),
    ("pidfd_getfd", libc::SYS_pidfd_getfd),
    ("kcmp", libc::SYS_kcmp),
    ("unshare", libc::SYS_unshare),
    ("setns", libc::SYS_setns),
    ("clone3", libc::SYS_clone3),
    ("mount", libc::SYS_mount),
    ("umount2", libc::SYS_umount2),
    ("pivot_root", libc::SYS_pivot_root),
    ("chroot", libc::SYS_chroot),
    ("fsopen", libc::SYS_fsopen),
    ("move_mount", libc::SYS_move_mount),
    ("open_tree", libc::SYS_open_tree),
    ("mknodat", libc::SYS_mknodat),
    ("open_by_handle_at", libc::SYS_open_by_handle_at),
    ("name_to_handle_at", libc::SYS_name_to_handle_at),
    ("bpf", libc::SYS_bpf),
    ("perf_event_open", libc::SYS_perf_event_open),
    ("userfaultfd", libc::SYS_userfaultfd),
    ("io_uring_setup", libc::SYS_io_uring_setup),
    ("io_uring_enter", libc::SYS_io_uring_enter),
    ("keyctl", libc::SYS_keyctl),
    ("add_key", libc::SYS_add_key),
    ("request_key", libc::SYS_request_key),
    ("init_module", libc::SYS_init_module),
    ("finit_module", libc::SYS_finit_module),
    ("kexec_load", libc::SYS_kexec_load),
    ("reboot", libc::SYS_reboot),
    ("swapon", libc::SYS_swapon),
    ("acct", libc::SYS_acct),
    ("syslog", libc::SYS_syslog),
    ("iopl", libc::SYS_iopl),
    ("ioperm", libc::SYS_ioperm),
    ("sethostname", libc::SYS_sethostname),
    ("clock_settime", libc::SYS_clock_settime),
    ("settimeofday", libc::SYS_settimeofday),
    ("adjtimex", libc::SYS_adjtimex),
    ("quotactl", libc::SYS_quotactl),
    ("fanotify_init", libc::SYS_fanotify_init),
    ("shmget", libc::SYS_shmget),
    ("msgget", libc::SYS_msgget),
    ("semget", libc::SYS_semget),
    ("mq_open", libc::SYS_mq_open),
    ("personality", libc::SYS_personality),
    ("setxattr", libc::SYS_setxattr),
    ("seccomp", libc::SYS_seccomp),
    ("capset", libc::SYS_capset),
    ("sched_setaffinity", libc::SYS_sched_setaffinity),
];

#[cfg(target_arch = "x86_64")]
#[tokio::test(flavor = "multi_thread")]
async fn the_kernel_is_asked_for_nothing_but_what_a_program_needs() {
    let numbers = REFUSED.iter().map(|(_, number)| number.to_string()).collect::<Vec<_>>().join(",");
    // EPERM, or ENOSYS of clone3; an allowed call would complain of its arguments, or work.
    let script = format!(
        "for $n ({numbers}) {{ $r = syscall($n, 0, 0, 0, 0, 0, 0); print \"$n \", $r, ' ', $! + 0, \"\\n\" }} \
         print 'user ', syscall({}, 0x10000000 | 17, 0, 0, 0, 0), ' ', $! + 0, \"\\n\"",
        libc::SYS_clone
    );
    let report = run(&["perl", "-e", &script], Vec::new(), Duration::from_secs(20)).await.unwrap();
    let lines: Vec<&str> = report.stdout.text.lines().collect();
    assert_eq!(lines.len(), REFUSED.len() + 1, "{report:?}");
    for (line, name) in lines.iter().zip(REFUSED.iter().map(|(name, _)| *name).chain(["a new user namespace"])) {
        let code = if name == "clone3" { libc::ENOSYS } else { libc::EPERM };
        assert!(line.ends_with(&format!(" -1 {code}")), "{name}: {line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_program_takes_more_than_it_is_given() {
    // A bomb is a few processes that fail to make more, and ends with its time.
    let time = Duration::from_secs(2);
    let bomb = run(&["/bin/sh", "-c", "b() { b | b & }; b; sleep 61.0625"], vec![], time).await.unwrap();
    assert!(bomb.timed_out || bomb.exit_code.is_some(), "{bomb:?}");
    let forks =
        "$n++ while defined($p = fork) and $p; exit unless defined $p or 1; print \"$n\\n\" if !defined $p; sleep 1";
    let forks = run(&["perl", "-e", forks], vec![], Duration::from_secs(20)).await.unwrap();
    let made: u64 = forks.stdout.text.trim().parse().unwrap();
    assert!((8..32).contains(&made), "{forks:?}");
    for (bytes, fits) in [("256 << 20", true), ("64 << 30", false)] {
        let script = format!("$x = 'a' x ({bytes}); print 'has it'");
        let memory = run(&["perl", "-e", &script], vec![], Duration::from_secs(20)).await.unwrap();
        assert_eq!(memory.stdout.text == "has it", fits, "{memory:?}");
    }
    for (script, most) in [
        ("head -c 400000000 /dev/zero > big; stat -c %s big; rm big", 64 << 20),
        ("head -c 60000000 /dev/zero > a; cp a b; cp a c; cp a d; cat a b c d | wc -c; rm a b c d", 160 << 20),
        ("truncate -s 1T sparse; stat -c %s sparse; rm sparse", 64 << 20),
        (
            "perl -e 'for (1..40000) { open(F, \">f$_\") or last; close F; $n++ } print \"$n\\n\"; unlink glob \"f*\"'",
            16_384,
        ),
    ] {
        let report = sh(script).await;
        let got: u64 = report.stdout.text.trim().parse().unwrap_or_else(|_| panic!("{script}: {report:?}"));
        assert!(got <= most, "{script}: {report:?}");
    }
    let loud = run(&["/bin/sh", "-c", "yes"], vec![], Duration::from_secs(20)).await.unwrap();
    assert!(
        loud.stdout.flooded && loud.stdout.cut && loud.stdout.text.len() <= 256 * 1024 && !loud.timed_out,
        "{:?}",
        loud.signal
    );
    let spin = run(&["perl", "-e", "1 while 1"], vec![], Duration::from_secs(1)).await.unwrap();
    assert!(spin.timed_out);
    // Whoever steps aside ends with the rest, and keeps nobody waiting.
    let aside = sh("setsid sh -c 'sleep 62.0625 & sleep 62.0625' & (sleep 62.0625 &) ; echo done").await;
    assert_eq!((aside.exit_code, aside.stdout.text.as_str()), (Some(0), "done\n"));
    eventually("everything to have ended", || async { processes("61.0625") + processes("62.0625") == 0 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_cannot_deceive_who_gathers_its_files() {
    let file = |path: &str| File::new(path.into(), b"x".to_vec());
    let given = || vec![file("kept/a"), file("kept/b"), file("c")];
    // What it hides is not removed.
    let argv = ["/bin/sh", "-c", "chmod 000 kept/a; chmod 000 kept; chmod 000 ."];
    let report = run(&argv, given(), Duration::from_secs(20)).await.unwrap();
    assert_eq!((report.removed.len(), report.files.len()), (0, 0), "{report:?}");
    // Nor are its limits those of who looks.
    let limits = format!("$new = pack('QQ', 0, 0); print syscall({}, 1, 7, $new, 0), ' ', $! + 0", libc::SYS_prlimit64);
    let report = run(&["perl", "-e", &limits], given(), Duration::from_secs(20)).await.unwrap();
    assert_eq!((report.stdout.text.as_str(), report.removed.len()), ("-1 1", 0), "{report:?}");
    // The first process of its world hears none of its signals.
    let report = sh("kill -9 1; kill -STOP 1; kill -TERM 1; kill -SEGV 1; kill -BUS 1; kill -SEGV 1; echo alive").await;
    assert_eq!((report.exit_code, report.stdout.text.as_str()), (Some(0), "alive\n"), "{report:?}");
    // Too many names, names of other worlds, and a directory that is too deep are told.
    let odd = "i=0; while [ $i -lt 3000 ]; do : > n$i; i=$((i+1)); done; : > .capx-x; d=; for i in $(seq 60); do d=$d/d; done; mkdir -p .$d; : > \"$(printf 'a\\nb')\"";
    let report = sh(odd).await;
    assert!(report.files.len() <= 2_000 && report.left.len() == 20, "{} {:?}", report.files.len(), report.left);
    assert!(report.files.iter().all(|file| !file.path.contains(".capx") && !file.path.contains('\n')));
    // As much as there may be goes in and comes out, and nobody waits for who reads nothing.
    let large = vec![File::new("large".into(), vec![7; 64 << 20])];
    let argv = ["/bin/sh", "-c", "mv large moved"];
    let report = run(&argv, large, Duration::from_secs(30)).await.unwrap();
    assert_eq!((report.removed.as_slice(), report.files[0].bytes.len()), (&["large".to_owned()][..], 64 << 20));
    let unread = Order { argv: vec!["true".into()], stdin: "x".repeat(256 << 10), ..Order::default() };
    assert_eq!(sandbox().run(unread, Duration::from_secs(20)).await.unwrap().exit_code, Some(0));
    // Who leaves many behind is not hindered by them.
    let report = sh("i=0; while [ $i -lt 100 ]; do (true &); i=$((i+1)); done; echo through").await;
    assert_eq!(report.stdout.text, "through\n", "{report:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_call_ends_the_program() {
    let call = tokio::spawn(async { run(&["sleep", "63.0625"], vec![], Duration::from_secs(60)).await });
    eventually("the program to run", || async { processes("63.0625") > 0 }).await;
    call.abort();
    eventually("the program to end", || async { processes("63.0625") == 0 }).await;
}

/// With one call of the kernel taken away from the sandbox itself.
fn without(syscall: i64) -> Result<Report, Failure> {
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
    let work = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let arch = std::env::consts::ARCH.try_into().unwrap();
        let rules = [(syscall, vec![])].into();
        let no = SeccompAction::Errno(libc::EPERM.unsigned_abs());
        let filter: BpfProgram = SeccompFilter::new(rules, SeccompAction::Allow, no, arch).unwrap().try_into().unwrap();
        apply_filter(&filter).unwrap();
        runtime.block_on(run(&["/bin/sh", "-c", "echo ran"], vec![], Duration::from_secs(10)))
    };
    std::thread::spawn(work).join().unwrap()
}

#[test]
fn with_one_layer_gone_nothing_is_run() {
    assert!(without(libc::SYS_getpriority).is_ok(), "what it does not need may be gone");
    for (layer, syscall) in [
        ("namespaces", libc::SYS_unshare),
        ("private mounts", libc::SYS_mount),
        ("pivot_root", libc::SYS_pivot_root),
        ("the old root", libc::SYS_umount2),
        ("capabilities", libc::SYS_capset),
        ("limits", libc::SYS_prlimit64),
        ("landlock", libc::SYS_landlock_create_ruleset),
        ("landlock", libc::SYS_landlock_add_rule),
        ("landlock", libc::SYS_landlock_restrict_self),
        ("seccomp", libc::SYS_seccomp),
    ] {
        let failure = without(syscall).expect_err(layer);
        assert!(failure.message.contains(&format!("nothing was run: {layer}")), "{layer}: {}", failure.message);
    }
}

const PROGRAMS: &str = "name: p
steps:
  - {id: put, action: file.write, params: {path: in.txt, content: '3 4 5'}}
  - {id: add, action: shell.run, params: {command: 'tr \" \" \"\\n\" < in.txt | awk \"{s += \\$1} END {print s}\" | tee out.txt'}}
  - {id: code, action: code.execute, params: {language: sh, code: 'cat out.txt -', stdin: ' and more'}}
  - {id: read, action: file.read, params: {path: out.txt}}
output: {sum: '${steps.read.output.content}', said: '${steps.code.output.stdout}', files: '${steps.add.output.files}'}
";

#[tokio::test(flavor = "multi_thread")]
async fn steps_run_programs_only_where_the_operator_allows_it() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, PROGRAMS).await;
    let worker = db.worker(SHORT_LEASE);
    let run = db.start(company, playbook, json!({})).await;
    let failed = db.until(company, run, RunStatus::Failed).await;
    let error = format!("{:?}", failed.error);
    assert!(error.contains("shell.run is off") && error.contains("CAPX_ALLOW_PROGRAMS"), "{error}");
    worker.stop().await;
    let _worker = db.worker_with_programs(sandbox());
    let run = db.start(company, playbook, json!({})).await;
    let done = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(done.output, Some(json!({"sum": "12\n", "said": "12\n and more", "files": ["out.txt"]})));
    let wrong = db
        .playbook(
            company,
            "name: w\nsteps:\n  - {id: a, action: shell.run, params: {command: 'echo so >&2; exit 4'}}\n",
        )
        .await;
    let run = db.start(company, wrong, json!({})).await;
    let failed = db.until(company, run, RunStatus::Failed).await;
    assert!(format!("{:?}", failed.error).contains("the program ended with 4; stderr: so"), "{:?}", failed.error);
}
