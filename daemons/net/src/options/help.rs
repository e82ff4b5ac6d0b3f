//! Texts of `--help`.

/// The manual.
pub const HELP: &str = "\
Usage: outboard-netd [options]
Gives virtual machines network cards over vhost-user, driven by QMP.

Options run in the order given. A value is key=value[,key=value...] with dots for
nested keys (rate-rx.bytes=10M), numbers for list items (iothread.0=a) and ,, for a
comma, or a JSON object. Everything that an option makes can also be made and
removed over QMP while the daemon runs.

  -h, --help             display this help and exit
  -V, --version          display the version and exit

  --netdev [type=]<type>,id=<id>[,type specific parameters...]
                         add a back-end: where frames go (QMP: netdev_add)
      tap                [ifname=<name>][,queues=<n>][,br=<bridge>][,mtu=<n>]
                         [,up=on|off][,sndbuf=<bytes>] | fd=<fd> | fds=<fd>:<fd>...
                         An interface that does not exist is made, and goes with
                         the daemon. <fd> is a number or a name
      macvtap            ifname=<name>[,queues=<n>] | fd=<fd> | fds=<fd>:<fd>...
      stream             addr.type=unix,addr.path=<path>[,server=on|off]
                         [,reconnect=<s>|reconnect-ms=<ms>]
                         frames with a length of 4 bytes before each, as QEMU's
                         -netdev stream, passt and gvproxy speak it
      dgram              local.type=unix,local.path=<path>
                         ,remote.type=unix,remote.path=<path>
                         a frame per datagram, as QEMU's -netdev dgram
      af-packet          ifname=<name>[,queues=<n>]
                         the frames of an interface that exists
      passt              [path=<program>][,args.0=<argument>...]
                         NAT without privileges: a passt that is started and
                         supervised here, only on the command line
      switch             [uplink=<netdev>][,iothread=<id>][,vlan=<n>|trunk=<vlans>]
                         [,native=<n>][,table-size=<n>][,port-limit=<n>]
                         [,ageing=<s>][,move-rate=<n>][,flood-rate=<n>]
                         [,unknown=flood|uplink|drop][,backlog=<bytes>]
                         a switch for the ports of this process; vlan, trunk and
                         native are those of its uplink
      null, echo         take every frame; give every frame back

  --port [id=]<id>,socket=<path>,netdev=<netdev>[,server=on|off]
         [,queues=<n>][,queue-size=<n>][,mac=<mac>][,mtu=<n>][,link=on|off]
         [,iothread=<id> | ,iothread.0=<id>,iothread.1=<id>...]
         [,rate-rx=<bytes/s> | ,rate-rx.<rate>...][,rate-tx...]
         [,guard=on|off | ,guard.<rule>...]
         [,vlan=<n> | ,trunk=<vlans>[,native=<n>]][,isolated=on|off]
         [,csum=off][,gso=off][,mrg-rxbuf=off][,packed=off][,in-order=off]
         [,ctrl-vq=off]
                         add a network card (QMP: port-add). The socket listens;
                         with server=off the daemon connects to a front-end that
                         listens. socket=fd:<fd> listens on a socket that was
                         handed over: a number, or a name of systemd socket
                         activation. queues= are queue pairs; pair i runs on
                         iothread i modulo their number, without iothreads on a
                         thread of its own. rx is what the guest receives, tx
                         what it sends. vlan, trunk (10:20:30-39 or all), native
                         and isolated concern a switch
      rates              bytes=<bytes/s>[,bytes-burst=<bytes>]
                         [,packets=<n/s>][,packets-burst=<n>][,group=<group>]
                         0: no limit. Bursts are by default what goes in a
                         tenth of a second
      rules              mac.0=<mac>...,ipv4.0=<network>...,ipv6.0=<network>...
                         [,dhcp-server=on][,router=on][,other-protocols=on]
                         guard=on keeps the guest from answering as a DHCP
                         server or router, lists also from other addresses

  --group [id=]<id>[,bytes=<bytes/s>][,bytes-burst=<bytes>][,packets=<n/s>]
          [,packets-burst=<n>]
                         add a rate that ports share (QMP: group-add)

  --object iothread,id=<id>[,poll-max-ns=<n>]
                         add a thread for queue pairs (QMP: object-add);
                         poll-max-ns=0 never polls

  --qmp <path>           serve QMP on a socket at this path, for one client at a
                         time
  --chardev socket,id=<id>,path=<path>,server=on[,wait=on|off]
  --chardev socket,id=<id>,fd=<number or name>,server=on[,wait=on|off]
  --chardev socket,id=<id>,path=<path>
  --chardev stdio,id=<id>
                         where a monitor's client comes from; with wait=on (the
                         default) start-up waits for the first
  --monitor [chardev=]<id>[,mode=control][,pretty=on|off]
                         serve QMP on a character device

  --metrics <path> | 127.0.0.1:<port> | [::1]:<port> | fd:<name>
                         serve counters for Prometheus by HTTP (/metrics)

  --daemonize            go into the background; the started process ends when
                         the daemon is ready, with status 1 when it failed.
                         The daemon's working directory is then /
  --pidfile <path>       write the process id to a file, locked while the
                         daemon runs and removed at its end

  --sandbox on|strict|off
                         what the daemon gives up once it serves. on (default):
                         all capabilities, syscalls that serving does not need,
                         and every path except --allow-dir, --state-dir and the
                         directories of its own sockets and pid file (these only
                         to make and remove sockets). What the kernel cannot restrict is
                         logged. strict: start only with all of it, and end the
                         process at a refused syscall. off: for debugging.
                         A tap added over QMP is then given by a descriptor
                         (getfd, and fd=<name>)
  --allow-dir <dir>      files beneath it can be made after start-up
                         (capture-start); repeatable

  --state-dir <dir>      where what guests said on their control queues is kept for
                         the daemon that is started after a kill. Private, in
                         memory, the same after a restart
                         (default: /dev/shm/outboard-<uid>)

  --log-level <level>    error, warn (default), info, debug, trace, or filters
                         as in netd=debug,info; overrides $RUST_LOG. The log
                         goes to standard error

Signals
  SIGTERM, SIGINT, SIGHUP end the daemon: rings stop, sockets are removed. A second
  one ends it at once.

Environment
  NOTIFY_SOCKET          told READY=1 and STOPPING=1 (systemd Type=notify)
  LISTEN_FDS, LISTEN_FDNAMES, LISTEN_PID
                         sockets handed over by systemd socket activation
  RUST_LOG               default of --log-level

Exit status
  0 after an orderly end, 1 when start-up failed, 101 after a defect of the daemon
  itself: start it again with the same options, and traffic goes on.

Examples
  outboard-netd --netdev tap,id=n0,ifname=tap0 \\
    --port p0,socket=/run/vm/net.sock,netdev=n0,mac=52:54:00:12:34:56 \\
    --qmp /run/vm/net.qmp --metrics 127.0.0.1:9100
  outboard-netd --netdev tap,id=up,ifname=tap0 --netdev switch,id=sw,uplink=up \\
    --port a,socket=/run/a.sock,netdev=sw,guard=on \\
    --port b,socket=/run/b.sock,netdev=sw,guard=on,rate-tx=10M
";

/// What `--object` prints when its value is `help` or ends with it.
pub fn of_objects(value: &str) -> Option<String> {
    let asks = value == "help" || value.ends_with(",help");
    asks.then(|| OBJECTS.to_owned())
}

/// The object types.
const OBJECTS: &str = "\
List of user creatable objects:
  iothread

iothread options:
  poll-max-ns=<int>
";
