//! Which addresses may be reached from here: public ones, and those that the
//! operator allows (hazard S6).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use url::{Host, Url};

/// Which private networks may be reached although they are private.
#[derive(Debug, Default)]
pub struct Rules {
    allow: Vec<IpNet>,
}

impl Rules {
    /// Reads a list of CIDRs parted by commas, as in `CAPX_EGRESS_ALLOW`.
    pub fn parse(list: &str) -> Result<Self, String> {
        let allow = list
            .split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty())
            .map(|part| {
                let address = part.parse::<IpAddr>().map(IpNet::from);
                part.parse::<IpNet>().or(address).map_err(|_| {
                    format!("CAPX_EGRESS_ALLOW: `{part}` is no network; write CIDRs such as 10.0.0.0/8,127.0.0.1/32")
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { allow })
    }

    /// Loopback too, for a developer's own machine.
    #[must_use]
    pub fn with_loopback(mut self) -> Self {
        self.allow.extend([
            IpNet::from(IpAddr::V4(Ipv4Addr::LOCALHOST)).supernet_to(8),
            IpNet::from(IpAddr::V6(Ipv6Addr::LOCALHOST)),
        ]);
        self
    }

    /// Whether an address may be reached.
    pub fn permits(&self, address: IpAddr) -> bool {
        let address = canonical(address);
        is_public(address) || self.allow.iter().any(|net| net.contains(&address))
    }
}

trait Supernet {
    fn supernet_to(self, prefix: u8) -> IpNet;
}

impl Supernet for IpNet {
    fn supernet_to(self, prefix: u8) -> IpNet {
        IpNet::new(self.addr(), prefix).map_or(self, |net| net.trunc())
    }
}

/// The address that is really meant: IPv4 inside of IPv6 in any of its forms.
fn canonical(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    if let Some(v4) = v6.to_ipv4_mapped() {
        return IpAddr::V4(v4);
    }
    let s = v6.segments();
    let low = |high: u16, low: u16| {
        let [a, b] = high.to_be_bytes();
        let [c, d] = low.to_be_bytes();
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    match s {
        // NAT64, 6to4 and the deprecated compatible form.
        [0x64, 0xff9b, 0, 0, 0, 0, h, l] => low(h, l),
        [0x2002, h, l, ..] => low(h, l),
        [0, 0, 0, 0, 0, 0, h, l] if h != 0 => low(h, l),
        _ => address,
    }
}

/// Whether an address belongs to the public internet (the special-purpose
/// registries of IANA, RFC 6890 and its successors).
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            !(v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_multicast()
                || v4.is_documentation()
                || a == 0
                || a >= 240
                || (a == 100 && (64..128).contains(&b))
                || (a == 192 && b == 0 && c == 0)
                || (a == 192 && b == 88 && c == 99)
                || (a == 198 && (18..20).contains(&b)))
        }
        IpAddr::V6(v6) => {
            let s = v6.segments();
            // Global unicast is 2000::/3; inside it, documentation, Teredo,
            // benchmarking and ORCHID are not.
            s[0] & 0xe000 == 0x2000 && !(s[0] == 0x2001 && (s[1] < 0x0200 || s[1] == 0x0db8)) && s[0] != 0x3fff
        }
    }
}

/// An address inside.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a public address; add its network to CAPX_EGRESS_ALLOW to reach it")]
pub struct Refused(pub String);

/// What is wrong with a URL that is to be called.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WrongUrl {
    /// None at all.
    #[error("`{0}` is no URL: {1}")]
    Unreadable(String, String),
    /// Not of the web.
    #[error("the scheme `{0}` is not allowed; use https or http")]
    Scheme(String),
    /// Where logs would show it.
    #[error("a URL must not carry credentials; use a header")]
    Credentials,
    /// An address inside.
    #[error(transparent)]
    Refused(#[from] Refused),
}

impl Rules {
    /// Reads a URL that may be called, as far as that can be told without
    /// looking its name up.
    pub fn check(&self, text: &str) -> Result<Url, WrongUrl> {
        let url = Url::parse(text).map_err(|error| {
            let short: String = text.chars().take(300).collect();
            WrongUrl::Unreadable(short, error.to_string())
        })?;
        if !matches!(url.scheme(), "http" | "https") {
            return Err(WrongUrl::Scheme(url.scheme().to_owned()));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(WrongUrl::Credentials);
        }
        if let Some(address) = literal(&url)
            && !self.permits(address)
        {
            return Err(Refused(url.host_str().unwrap_or_default().to_owned()).into());
        }
        Ok(url)
    }

    /// Whether plain HTTP may be spoken to a URL's host: only inside, where the
    /// operator has allowed it.
    pub fn allows_plain(&self, url: &Url) -> bool {
        let inside = |address: IpAddr| !is_public(canonical(address)) && self.permits(address);
        match url.host() {
            Some(Host::Domain("localhost")) => inside(Ipv4Addr::LOCALHOST.into()),
            _ => literal(url).is_some_and(inside),
        }
    }
}

fn literal(url: &Url) -> Option<IpAddr> {
    match url.host()? {
        Host::Ipv4(v4) => Some(v4.into()),
        Host::Ipv6(v6) => Some(v6.into()),
        // `１２７.0.0.1` is an address by now; what is left is a name.
        Host::Domain(_) => None,
    }
}
