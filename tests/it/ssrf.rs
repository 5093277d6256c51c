//! No spelling of an address inside leads a call there, and no answer does (hazard S6).

use std::net::{Ipv4Addr, TcpListener};
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use axum::routing::get;
use capx_core::domain::address::Rules;
use capx_core::domain::outcome::ErrorClass;
use capx_workers::egress::{Call, Egress};

/// Addresses that are nobody's outside: this host's, a network's own, or kept back.
const INSIDE: &[[u8; 4]] = &[
    [127, 0, 0, 1],
    [127, 8, 9, 10],
    [0, 0, 0, 0],
    [10, 0, 0, 1],
    [100, 64, 0, 1],
    [169, 254, 169, 254],
    [172, 16, 0, 1],
    [172, 31, 255, 254],
    [192, 0, 0, 8],
    [192, 168, 1, 1],
    [198, 18, 0, 1],
    [224, 0, 0, 1],
    [240, 0, 0, 1],
    [255, 255, 255, 255],
];

/// The ways to write one that URL parsers know.
fn spellings([a, b, c, d]: [u8; 4]) -> Vec<String> {
    let all = u32::from(Ipv4Addr::new(a, b, c, d));
    let (last3, last2) = (all & 0x00ff_ffff, all & 0xffff);
    let dotted = format!("{a}.{b}.{c}.{d}");
    let wide = |c: char| c.to_digit(10).and_then(|digit| char::from_u32(0xff10 + digit)).unwrap_or(c);
    let percent = |c: char| format!("%{:02x}", u32::from(c));
    let (high, low) = (all >> 16, last2);
    vec![
        format!("{dotted}."),
        format!("{all}"),
        format!("{all:#x}"),
        format!("0{all:o}"),
        format!("{a:#x}.{b:#x}.{c:#x}.{d:#x}"),
        format!("0{a:o}.0{b:o}.0{c:o}.0{d:o}"),
        format!("{a}.{b}.{last2}"),
        format!("{a}.{last3}"),
        format!("{a:#x}.{last3}"),
        dotted.chars().map(wide).collect(),
        dotted.replace('.', "\u{3002}"),
        dotted.chars().map(percent).collect(),
        format!("[::ffff:{dotted}]"),
        format!("[::ffff:{high:x}:{low:x}]"),
        format!("[0:0:0:0:0:ffff:{high:x}:{low:x}]"),
        format!("[64:ff9b::{high:x}:{low:x}]"),
        format!("[2002:{high:x}:{low:x}::]"),
        dotted,
    ]
}

/// Those that only IPv6 has, names of this host, and what is no address of the web at all.
const OTHERS: &[&str] = &[
    "http://[::]:PORT/",
    "http://[::1]:PORT/",
    "http://[0:0:0:0:0:0:0:1]:PORT/",
    "http://[::127.0.0.1]:PORT/",
    "http://[fe80::1]:PORT/",
    "http://[fe80::1%25lo]:PORT/",
    "http://[fc00::1]:PORT/",
    "http://[fd12:3456::1]:PORT/",
    "http://[ff02::1]:PORT/",
    "http://[2001:db8::1]:PORT/",
    "http://localhost:PORT/",
    "http://LOCALHOST:PORT/",
    "http://public.example@127.0.0.1:PORT/",
    "http://127.0.0.1:PORT@127.0.0.1:PORT/",
    "http://\\127.0.0.1:PORT/",
    "http:127.0.0.1:PORT/",
    "http:////127.0.0.1:PORT/",
    " http://127.0.0.1:PORT/",
    "ht\ntp://127.0.0.1:PORT/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:PORT/",
    "ftp://127.0.0.1:PORT/",
    "dict://127.0.0.1:PORT/",
    "ws://127.0.0.1:PORT/",
    "unix:/run/postgresql",
    "data:text/plain,x",
    "//127.0.0.1:PORT/",
];

fn call(url: String) -> Call {
    Call {
        method: reqwest::Method::GET,
        url,
        headers: Vec::new(),
        body: None,
        idempotency_key: "k".into(),
        timeout: Duration::from_secs(10),
        idle: Duration::from_secs(10),
        limit: 1_024,
        large: None,
        trusted: false,
    }
}

/// Listens on every address that this host has.
fn listeners() -> (u16, Vec<TcpListener>) {
    let all = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = all.local_addr().unwrap().port();
    // A host without IPv6 has none of its addresses either.
    let listeners: Vec<TcpListener> = TcpListener::bind(("::1", port)).into_iter().chain([all]).collect();
    listeners.iter().for_each(|listener| listener.set_nonblocking(true).unwrap());
    (port, listeners)
}

fn connections(listeners: &[TcpListener]) -> usize {
    listeners.iter().filter(|listener| listener.accept().is_ok()).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_of_an_address_inside_is_connected_to() {
    let (port, listeners) = listeners();
    let spelled = INSIDE
        .iter()
        .flat_map(|address| spellings(*address))
        .flat_map(|host| ["http://HOST:PORT/", "https://HOST:PORT/x?y#z"].map(|form| form.replace("HOST", &host)));
    let urls: Vec<String> = spelled
        .chain(OTHERS.iter().map(ToString::to_string))
        .map(|url| url.replace("PORT", &port.to_string()))
        .collect();
    assert!(urls.len() >= 500, "{}", urls.len());
    let egress = Egress::new(Rules::default()).unwrap();
    for url in urls {
        let failure = egress.call(call(url.clone())).await.expect_err(&url);
        // Refused, and not merely out of reach.
        assert!(
            matches!(failure.class, ErrorClass::Governance | ErrorClass::Invalid),
            "{url}: {:?} {}",
            failure.class,
            failure.message
        );
        assert_eq!(connections(&listeners), 0, "{url}");
    }
    // The listeners do hear.
    let allowed = Egress::new(Rules::default().with_loopback()).unwrap();
    let unheard = Call { timeout: Duration::from_millis(300), ..call(format!("http://127.0.0.1:{port}/")) };
    assert!(allowed.call(unheard).await.is_err());
    assert_eq!(connections(&listeners), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_answer_leads_anywhere() {
    let (port, listeners) = listeners();
    let lead = move |axum::extract::Path(status): axum::extract::Path<u16>| async move {
        let to = format!("http://127.0.0.1:{port}/");
        (StatusCode::from_u16(status).unwrap(), [("location", to)]).into_response()
    };
    let server = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", server.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(server, Router::new().route("/{status}", get(lead))).await });
    // Even where the place that it names could be reached.
    let egress = Egress::new(Rules::default().with_loopback()).unwrap();
    for status in [300, 301, 302, 303, 307, 308] {
        let answer = egress.call(call(format!("{url}/{status}"))).await.unwrap();
        assert_eq!((answer.status, connections(&listeners)), (status, 0));
    }
}
