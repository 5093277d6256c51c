//! The client against a server: what people and programs type, and what they are told.

use std::process::{Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use capx_core::domain::ids::RunId;
use capx_core::domain::run::RunStatus;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::{Api, Db, SHORT_LEASE, eventually, scratch};

/// A terminal with a server's address and key.
struct Terminal {
    url: String,
    key: String,
}

impl Terminal {
    fn of(api: &Api) -> Self {
        Self { url: api.base.clone(), key: api.key.clone() }
    }

    async fn types(&self, arguments: &[&str]) -> Said {
        let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_capx"))
            .args(arguments)
            .envs([("CAPX_API_URL", &self.url), ("CAPX_API_KEY", &self.key)])
            .env("NO_COLOR", "1")
            .env_remove("CAPX_COMPANY")
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .stdin(Stdio::null())
            .output()
            .await
            .unwrap();
        Said(output)
    }
}

struct Said(Output);

impl Said {
    fn out(&self) -> &str {
        std::str::from_utf8(&self.0.stdout).unwrap()
    }

    fn err(&self) -> &str {
        std::str::from_utf8(&self.0.stderr).unwrap()
    }

    #[track_caller]
    fn ends_with(self, code: i32) -> Self {
        assert_eq!(self.0.status.code(), Some(code), "out: {}\nerr: {}", self.out(), self.err());
        self
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.0.stdout).unwrap()
    }
}

fn file(yaml: &str) -> String {
    let path = scratch().join(format!("{}.yml", uuid::Uuid::now_v7()));
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, yaml).unwrap();
    path.display().to_string()
}

const DOUBLE: &str = "name: double it
inputs: {n: {type: number, required: true}}
steps:
  - {id: twice, action: transform, params: {n: '${inputs.n * 2}'}}
output: ${steps.twice.n}
";

#[tokio::test(flavor = "multi_thread")]
async fn an_author_stores_compares_and_runs_a_playbook() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    db.company(&["a"], "claude", json!({})).await;
    let terminal = Terminal::of(&api);

    let made = terminal.types(&["playbook", "create", "--file", &file(DOUBLE)]).await.ends_with(0);
    assert!(made.out().starts_with("pb_") && made.out().ends_with("  double it version 1\n"), "{}", made.out());
    let listed = terminal.types(&["playbook", "list"]).await.ends_with(0);
    assert!(listed.out().starts_with("ID ") && listed.out().contains("  double it "), "{}", listed.out());
    let text = terminal.types(&["playbook", "get", "double it", "--yaml"]).await.ends_with(0);
    assert_eq!(text.out(), DOUBLE);

    // People see what happens, programs get one value.
    let seen = terminal.types(&["playbook", "run", "double it", "-p", "n=21", "--wait"]).await.ends_with(0);
    for told in ["playbook.started", "Completed step: twice", "  completed  $0", "\n42\n"] {
        assert!(seen.out().contains(told), "{told}: {}", seen.out());
    }
    let run = terminal.types(&["playbook", "run", "double it", "-p", "n=4", "--wait", "--json"]).await.ends_with(0);
    assert_eq!((&run.json()["status"], &run.json()["output"]), (&json!("completed"), &json!(8)));
    let id = run.json()["run_id"].as_str().unwrap().to_owned();
    let again = terminal.types(&["run", "replay", &id, "-p", "n=5"]).await.ends_with(0);
    let again = terminal.types(&["run", "watch", again.out().trim()]).await.ends_with(0);
    assert!(again.out().ends_with("\n10\n"), "{}", again.out());
    let events = terminal.types(&["run", "watch", &id, "--json"]).await.ends_with(0);
    let names: Vec<Value> =
        events.out().lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["event"].clone()).collect();
    assert_eq!(json!(names), json!(["playbook.started", "step.completed", "playbook.completed"]));

    let other = file(&DOUBLE.replace("* 2", "* 3"));
    terminal.types(&["playbook", "create", "--file", &other]).await.ends_with(0);
    let diff = terminal.types(&["playbook", "diff", "double it"]).await.ends_with(0);
    assert_eq!(diff.out(), "version 1 to 2\n~ steps.twice.params.n: \"${inputs.n * 2}\" -> \"${inputs.n * 3}\"\n");
    let back = terminal.types(&["playbook", "rollback", "double it", "1"]).await.ends_with(0);
    assert_eq!(back.out(), "double it is at version 3\n");
    let same = terminal.types(&["playbook", "diff", "double it", "--from", "1", "--to", "3"]).await.ends_with(0);
    assert_eq!(same.out(), "version 1 to 3\nthey mean the same\n");
    let runs = terminal.types(&["run", "list", "double it", "--json"]).await.ends_with(0);
    assert_eq!(runs.json().as_array().unwrap().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approver_sees_what_waits_and_decides() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = "name: gated\nsteps:\n  - {id: go, action: transform, params: {n: 1}, approval: required}\n";
    let playbook = db.playbook(company, yaml).await;
    let terminal = Terminal::of(&api);
    let started = terminal.types(&["playbook", "run", &playbook.to_string()]).await.ends_with(0);
    let id = started.out().trim().to_owned();
    let run: RunId = id.parse().unwrap();
    db.until(company, run, RunStatus::Suspended).await;

    let gate = terminal.types(&["approval", "list", "--json"]).await.ends_with(0).json()[0]["id"].clone();
    let gate = gate.as_str().unwrap();
    let shown = terminal.types(&["run", "get", &id]).await.ends_with(0);
    assert!(shown.out().contains("waits for an approval until "), "{}", shown.out());
    assert!(shown.out().contains(&format!("capx approval approve {gate}\n")), "{}", shown.out());
    let status = terminal.types(&["status"]).await.ends_with(0);
    assert!(status.out().contains("- 1 worker at work\n- 1 approval is pending"), "{}", status.out());

    let refused = terminal.types(&["approval", "reject", gate, "--feedback", "not today"]).await.ends_with(0);
    assert_eq!(refused.out(), format!("rejected {gate}\n"));
    let watched = terminal.types(&["run", "watch", &id]).await.ends_with(1);
    assert!(watched.out().contains("the approval was rejected: not today"), "{}", watched.out());
    assert_eq!(watched.err(), format!("{id}\ncapx: the run is failed\n"));
    // The other way is refused, with the request's id.
    let late = terminal.types(&["approval", "approve", gate]).await.ends_with(3);
    assert!(late.err().contains("\n  conflict (request req_"), "{}", late.err());

    terminal.types(&["run", "retry", &id]).await.ends_with(0);
    db.until(company, run, RunStatus::Suspended).await;
    let gate = terminal.types(&["approval", "list", "--json"]).await.ends_with(0).json()[0]["id"].clone();
    terminal.types(&["approval", "approve", gate.as_str().unwrap(), "--note", "fine"]).await.ends_with(0);
    terminal.types(&["run", "watch", &id]).await.ends_with(0);
    let cancelled = terminal.types(&["run", "cancel", &id]).await.ends_with(3);
    assert!(cancelled.err().contains("completed"), "{}", cancelled.err());
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_told_with_what_to_do_and_a_code() {
    let db = Db::new().await;
    let api = db.api().await;
    db.company(&["a"], "claude", json!({})).await;
    let terminal = Terminal::of(&api);
    terminal.types(&["playbook", "create", "-f", &file(DOUBLE)]).await.ends_with(0);
    let broken = file("name: x\nsteps:\n  - {id: a, action: transfrm}\n");
    let nobody = Terminal { url: "http://127.0.0.1:1".into(), key: "k".into() };
    let stranger = Terminal { url: api.base.clone(), key: "capx_live_wrong".into() };
    for (terminal, arguments, code, told) in [
        (&terminal, vec!["playbook", "run", "dubble"], 3, "there is no playbook `dubble`; `capx playbook list` shows"),
        (&terminal, vec!["playbook", "run", "double it"], 3, "params.n: is required, of type number"),
        (&terminal, vec!["playbook", "run", "double it", "-p", "n"], 2, "must be KEY=VALUE"),
        (&terminal, vec!["playbook", "get", "pb_nonsense"], 3, "there is no such playbook"),
        (&terminal, vec!["playbook", "rollback", "double it", "9"], 3, "version"),
        (&terminal, vec!["run", "get", "run_nonsense"], 3, "there is no such run"),
        (&terminal, vec!["playbook", "create", "-f", "/nowhere"], 1, "/nowhere cannot be read"),
        (&terminal, vec!["playbook", "create", "-f", &broken], 1, "did you mean `transform`?"),
        (&stranger, vec!["status"], 3, "unauthorized (request req_"),
        (&nobody, vec!["status"], 4, "http://127.0.0.1:1 does not answer: Connection refused"),
    ] {
        let said = terminal.types(&arguments).await.ends_with(code);
        assert!(said.err().contains(told), "{arguments:?}: {}", said.err());
        assert_eq!(said.out(), "", "{arguments:?}: nothing on standard output");
    }
    assert_eq!(db.count("select count(*) from playbooks").await, 1, "nothing was stored");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_whose_answer_is_lost_is_made_once() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, DOUBLE).await;
    let (port, lost) = losing_answers(api.base.rsplit(':').next().unwrap().parse().unwrap(), 2).await;
    let terminal = Terminal { url: format!("http://127.0.0.1:{port}"), key: api.key.clone() };
    let started = terminal.types(&["playbook", "run", &playbook.to_string(), "-p", "n=1"]).await.ends_with(0);
    assert_eq!(lost.load(SeqCst), 2, "the fault fired");
    eventually("the run", || async { db.count("select count(*) from runs").await == 1 }).await;
    let run: RunId = started.out().trim().parse().unwrap();
    assert_eq!(db.run(company, run).await.status, RunStatus::Running);
}

/// A way to a server on which the first answers to changes get lost.
async fn losing_answers(to: u16, most: usize) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let lost = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&lost);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            tokio::spawn(carry(client, to, Arc::clone(&count), most));
        }
    });
    (port, lost)
}

async fn carry(mut client: TcpStream, to: u16, lost: Arc<AtomicUsize>, most: usize) {
    let mut server = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
    let (mut asked, mut answered, mut change) = ([0; 4096], [0; 4096], false);
    loop {
        tokio::select! {
            Ok(read @ 1..) = client.read(&mut asked) => {
                change |= asked.starts_with(b"POST ");
                server.write_all(&asked[..read]).await.unwrap();
            }
            Ok(read @ 1..) = server.read(&mut answered) => {
                if change && lost.load(SeqCst) < most {
                    lost.fetch_add(1, SeqCst);
                    return;
                }
                client.write_all(&answered[..read]).await.unwrap();
            }
            else => return,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_go_in_by_a_file_and_artifacts_come_out_as_bytes() {
    let db = Db::new().await;
    let (api, _worker) = (db.api().await, db.worker(SHORT_LEASE));
    let company = db.company(&["a"], "claude", json!({})).await;
    let terminal = Terminal::of(&api);
    let value = file("from-a-file-9f3k\n");
    let said = terminal.types(&["secret", "set", "TOKEN", "--file", &value]).await.ends_with(0);
    assert_eq!(said.out(), "set TOKEN\n");
    assert!(terminal.types(&["secret", "list"]).await.ends_with(0).out().contains("TOKEN"));
    let said = terminal.types(&["secret", "set", "OTHER"]).await.ends_with(2);
    assert!(said.err().contains("nothing came from stdin"), "{}", said.err());
    let short = file("short");
    let said = terminal.types(&["secret", "set", "OTHER", "--file", &short]).await.ends_with(3);
    assert!(said.err().contains("must be 8 to 16384 bytes"), "{}", said.err());
    let yaml = "name: tells
secrets: TOKEN
inputs: {text: string}
steps: [{id: a, action: transform, params: {token: '${secrets.TOKEN}', text: '${inputs.text}', same: '${inputs.text}'}}]
";
    let playbook = db.playbook(company, yaml).await;
    let text = "0123456789".repeat(20_000);
    let run = db.start(company, playbook, json!({"text": text})).await;
    db.until(company, run, RunStatus::Completed).await;
    let shown = terminal.types(&["run", "get", &run.to_string(), "--json"]).await.ends_with(0).json();
    let output = &shown["steps"][0]["output"];
    assert_eq!(output["token"], json!("[secret TOKEN]"));
    let artifact = ["text", "same"].iter().find_map(|key| output[*key]["artifact"].as_str()).unwrap();
    let said = terminal.types(&["run", "artifact", artifact]).await.ends_with(0);
    assert!(said.out() == text);
    let into = file("");
    terminal.types(&["run", "artifact", artifact, "--file", &into]).await.ends_with(0);
    assert!(std::fs::read_to_string(&into).unwrap() == text);
    terminal.types(&["run", "artifact", &"0".repeat(64)]).await.ends_with(3);
    let said = terminal.types(&["run", "artifact", artifact, "--file", "/none/such"]).await.ends_with(2);
    assert!(said.err().contains("cannot write /none/such"), "{}", said.err());
    terminal.types(&["secret", "delete", "TOKEN"]).await.ends_with(0);
    let said = terminal.types(&["secret", "delete", "TOKEN"]).await.ends_with(3);
    assert!(said.err().contains("there is no such secret"), "{}", said.err());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_registers_tests_and_repairs_a_webhook() {
    let db = Db::new().await;
    let (api, _worker) = (db.api().await, db.worker(SHORT_LEASE));
    let receiver = crate::receiver::Receiver::start().await;
    db.company(&["a"], "claude", json!({})).await;
    let terminal = Terminal::of(&api);
    let said =
        terminal.types(&["webhook", "create", "https://example.com/", "--event", "task.creatd"]).await.ends_with(3);
    assert!(said.err().contains("did you mean `task.created`?"), "{}", said.err());
    let made =
        terminal.types(&["webhook", "create", "https://example.com/", "--event", "approval.*"]).await.ends_with(0);
    let (id, secret) = made.out().trim().split_once('\n').unwrap();
    assert!(id.starts_with("wh_") && secret.starts_with("secret whsec_"), "{}", made.out());
    sqlx::query("update webhooks set url = $1")
        .bind(format!("{}/switch", receiver.url))
        .execute(&db.pool)
        .await
        .unwrap();
    let said = terminal.types(&["webhook", "test", id, "--event", "approval.requested"]).await.ends_with(0);
    assert!(said.out().starts_with("completed: answered 200 in "), "{}", said.out());
    receiver.fail(true);
    let said = terminal.types(&["webhook", "test", id]).await.ends_with(0);
    assert!(said.out().starts_with("failed: the answer was 503"), "{}", said.out());
    receiver.fail(false);
    let all = terminal.types(&["webhook", "deliveries", id, "--json"]).await.ends_with(0).json();
    let failed = all.as_array().unwrap().iter().find(|one| one["status"] == "pending").unwrap();
    terminal.types(&["webhook", "redeliver", id, failed["id"].as_str().unwrap()]).await.ends_with(0);
    crate::harness::eventually("both to be taken", || async {
        db.count("select count(*) from deliveries where status = 'succeeded'").await == 2
    })
    .await;
    let said = terminal.types(&["webhook", "redeliver", id, "--since", "2026-01-01"]).await.ends_with(0);
    assert_eq!(said.out(), "sent again: 0\n");
    terminal.types(&["webhook", "redeliver", id]).await.ends_with(2);
    terminal.types(&["webhook", "disable", id]).await.ends_with(0);
    let said = terminal.types(&["webhook", "list"]).await.ends_with(0);
    assert!(said.out().contains("disabled: disabled by hand"), "{}", said.out());
    assert!(terminal.types(&["webhook", "test", id]).await.ends_with(3).err().contains("enable it first"));
    terminal.types(&["webhook", "enable", id]).await.ends_with(0);
    assert!(terminal.types(&["webhook", "rotate-secret", id]).await.ends_with(0).out().starts_with("secret whsec_"));
    terminal.types(&["webhook", "delete", id]).await.ends_with(0);
    terminal.types(&["webhook", "deliveries", id]).await.ends_with(3);
}
