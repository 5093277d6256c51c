//! Streams: every event, once, whatever the order of commits, whoever goes
//! away, whichever process answers.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use capx_core::domain::event::{Event, TASK_CREATED};
use capx_core::domain::ids::CompanyId;
use capx_core::store::{events, tenants};
use futures_util::StreamExt as _;
use serde_json::{Value, json};

use crate::harness::{Api, Db, PATIENCE, SHORT_LEASE, Seeded, eventually};

/// An open stream.
struct Stream {
    body: std::pin::Pin<Box<dyn futures_util::Stream<Item = reqwest::Result<axum::body::Bytes>> + Send>>,
    text: String,
}

/// What a stream brings.
#[derive(Debug)]
enum Frame {
    Comment,
    Event { id: String, kind: String, data: Value },
    End,
}

impl Stream {
    async fn open(api: &Api, path: &str, last: Option<&str>) -> Result<Self, u16> {
        let mut request = api
            .client
            .get(format!("{}{path}", api.base))
            .header("authorization", format!("Bearer {}", api.key))
            .header("accept", "text/event-stream");
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        // As every client of a stream: a process that is too busy for a moment
        // is asked again.
        let began = std::time::Instant::now();
        let response = loop {
            let response = request.try_clone().unwrap().send().await.unwrap();
            match response.status().as_u16() {
                200 => break response,
                503 if began.elapsed() < PATIENCE => tokio::time::sleep(Duration::from_millis(100)).await,
                status => return Err(status),
            }
        };
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Ok(Self { body: Box::pin(response.bytes_stream()), text: String::new() })
    }

    async fn next(&mut self) -> Frame {
        loop {
            if let Some(end) = self.text.find("\n\n") {
                let frame: String = self.text.drain(..end + 2).collect();
                if frame.starts_with(':') {
                    return Frame::Comment;
                }
                let field = |name: &str| {
                    let line = frame.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
                    line.trim_start_matches(": ").to_owned()
                };
                let data: Value = serde_json::from_str(&field("data")).unwrap();
                assert_eq!(data["id"], field("id"), "{frame}");
                return Frame::Event { id: field("id"), kind: field("event"), data };
            }
            match tokio::time::timeout(PATIENCE, self.body.next()).await.expect("something within the patience") {
                Some(Ok(bytes)) => self.text.push_str(std::str::from_utf8(&bytes).unwrap()),
                _ => return Frame::End,
            }
        }
    }

    async fn event(&mut self) -> Option<(String, String, Value)> {
        loop {
            match self.next().await {
                Frame::Comment => {}
                Frame::Event { id, kind, data } => return Some((id, kind, data)),
                Frame::End => return None,
            }
        }
    }
}

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

/// Writers that hold their transactions open at random, readers that go away
/// at random and come back to another process. The full form:
/// `CAPX_STREAM_EVENTS=1000000 CAPX_STREAM_READERS=200`.
#[tokio::test(flavor = "multi_thread")]
async fn no_event_is_skipped_or_repeated_across_reconnects() {
    let db = Db::new().await;
    db.invents_events();
    let apis = Arc::new([db.api().await, db.api().await]);
    let company = db.company(&["writer"], "claude", json!({})).await;
    let (writers, readers) = (50, setting("CAPX_STREAM_READERS", 24));
    let each = setting("CAPX_STREAM_EVENTS", 2_000).div_ceil(writers);
    let path = format!("/v1/companies/{company}/activity?stream=true&type=task");
    let (connected, resumed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let ended = Arc::new(AtomicUsize::new(0));
    let reading: Vec<_> = (0..readers)
        .map(|n| {
            let (apis, path) = (Arc::clone(&apis), path.clone());
            let (connected, resumed) = (Arc::clone(&connected), Arc::clone(&resumed));
            let ended = Arc::clone(&ended);
            tokio::spawn(async move {
                let mut random = Seeded(n as u64);
                let mut seen: Vec<String> = Vec::new();
                let mut last: Option<String> = None;
                while seen.len() < writers * each {
                    let api = &apis[random.below(2) as usize];
                    let mut stream = Stream::open(api, &path, last.as_deref()).await.unwrap();
                    if last.is_none() {
                        assert!(matches!(stream.next().await, Frame::Comment));
                        connected.fetch_add(1, Ordering::Relaxed);
                    } else {
                        resumed.fetch_add(1, Ordering::Relaxed);
                    }
                    for _ in 0..1 + random.below(300) {
                        // A process that cannot read the log for a while lets its
                        // streams go, and they come back.
                        let Some((id, ..)) = stream.event().await else {
                            ended.fetch_add(1, Ordering::Relaxed);
                            break;
                        };
                        last = Some(id.clone());
                        seen.push(id);
                        if seen.len() == writers * each {
                            break;
                        }
                    }
                }
                seen
            })
        })
        .collect();
    eventually("all readers to be connected", || async { connected.load(Ordering::Relaxed) == readers }).await;
    let writing = (0..writers).map(|n| {
        let pool = db.pool.clone();
        tokio::spawn(async move {
            let mut random = Seeded(1_000 + n as u64);
            for _ in 0..each {
                // They are many to few connections, and the disk may be busy.
                let mut tx = loop {
                    match pool.begin().await {
                        Err(sqlx::Error::PoolTimedOut) => continue,
                        begun => break begun.unwrap(),
                    }
                };
                let event = Event::new(TASK_CREATED, json!({"task_id": "tsk_x", "title": "x"}));
                events::append(&mut *tx, company, &[event]).await.unwrap();
                tokio::time::sleep(Duration::from_millis(random.below(20))).await;
                tx.commit().await.unwrap();
            }
        })
    });
    for written in futures_util::future::join_all(writing).await {
        written.unwrap();
    }
    let mut first: Option<Vec<String>> = None;
    for seen in futures_util::future::join_all(reading).await {
        let seen = seen.unwrap();
        let unique: HashSet<&String> = seen.iter().collect();
        assert_eq!((seen.len(), unique.len()), (writers * each, writers * each), "skipped or repeated");
        // Nor in another order for anybody.
        assert!(first.get_or_insert_with(|| seen.clone()) == &seen);
    }
    let (resumed, ended) = (resumed.load(Ordering::Relaxed), ended.load(Ordering::Relaxed));
    assert!(resumed >= readers, "nobody came back");
    // Which is the exception.
    assert!(ended * 10 <= resumed, "{ended} of {resumed} streams ended by themselves");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_runs_stream_tells_all_of_it_in_order_and_ends_with_it() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = "name: t\nsteps: [{id: a, action: transform}, {id: b, action: transform, approval: required}, {id: c, action: transform}]\n";
    let playbook = db.playbook(company, yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    let path = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}/events");
    let mut stream = Stream::open(&api, &path, None).await.unwrap();
    let mut told = Vec::new();
    let mut ids = Vec::new();
    while let Some((id, kind, data)) = stream.event().await {
        assert_eq!(data["type"], kind);
        ids.push(id);
        told.push(data["event"].as_str().unwrap().to_owned());
        if data["event"] == "approval.requested" {
            let id = data["resource"]["id"].as_str().unwrap();
            assert_eq!(api.post(&format!("/v1/approvals/{id}/approve"), json!({})).await.0, 200);
        }
    }
    let wanted = [
        "playbook.started",
        "step.completed",
        "approval.requested",
        "playbook.suspended",
        "approval.resolved",
        "playbook.resumed",
        "step.completed",
        "step.completed",
        "playbook.completed",
    ];
    assert_eq!(told, wanted);
    // Resumed in the middle, by the id that was seen last.
    let mut rest = Stream::open(&api, &path, Some(&ids[3])).await.unwrap();
    let mut again = Vec::new();
    while let Some((id, ..)) = rest.event().await {
        again.push(id);
    }
    assert_eq!(again, ids[4..]);
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_are_filtered_are_ones_own_and_end_with_their_key() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["writer", "reader"], "claude", json!({})).await;
    let other: CompanyId = db.company(&["x"], "claude", json!({})).await;
    let base = format!("/v1/companies/{company}");
    let made = capx::keys::make(&db.pool, db.account, None, "s", true, &["*".into()]).await.unwrap();
    let streamer = api.with(&made.key);
    let mut all = Stream::open(&streamer, "/v1/activity/stream?type=task", None).await.unwrap();
    let mut log = Stream::open(&streamer, &format!("{base}/agents/writer/logs"), None).await.unwrap();
    for stream in [&mut all, &mut log] {
        assert!(matches!(stream.next().await, Frame::Comment));
    }
    let make = async |company: &str, agent: &str, title: &str| {
        let body = json!({"title": title, "agent_id": agent});
        let (status, answer) = api.post(&format!("/v1/companies/{company}/tasks"), body).await;
        assert_eq!(status, 201, "{answer}");
    };
    make(&company.to_string(), "reader", "one").await;
    make(&other.to_string(), "x", "two").await;
    make(&company.to_string(), "writer", "three").await;
    let mut titles = HashSet::new();
    let mut last = String::new();
    for _ in 0..3 {
        let (id, kind, data) = all.event().await.unwrap();
        assert_eq!(kind, "task");
        titles.insert(data["data"]["title"].as_str().unwrap().to_owned());
        last = id;
    }
    assert_eq!(titles, ["one", "two", "three"].map(str::to_owned).into());
    let (_, _, data) = log.event().await.unwrap();
    assert_eq!((&data["data"]["title"], &data["actor"]["role"]), (&json!("three"), &json!("writer")));
    // Another account sees nothing of it, nor by an event's id.
    let stranger = tenants::account(&db.pool, "stranger", "enterprise").await.unwrap();
    let key = capx::keys::make(&db.pool, stranger, None, "s", true, &["*".into()]).await.unwrap();
    let stranger = api.with(&key.key);
    assert_eq!(Stream::open(&stranger, &format!("{base}/activity?stream=true"), None).await.err(), Some(404));
    assert_eq!(Stream::open(&stranger, "/v1/activity/stream", Some(&last)).await.err(), Some(404));
    assert_eq!(Stream::open(&api, "/v1/activity/stream", Some("evt_1")).await.err(), Some(404));
    // A revoked key's streams end.
    assert!(tenants::revoke_key(&db.pool, made.id).await.unwrap());
    let ended = async {
        assert!(all.event().await.is_none());
        assert!(log.event().await.is_none());
    };
    tokio::time::timeout(Duration::from_secs(5), ended).await.expect("the streams end within 5 s");
}
